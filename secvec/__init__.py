"""Security vectors: fine-tune on data you cannot fully trust without learning its undesired behavior."""

__version__ = "0.1.0"
