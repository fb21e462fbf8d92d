"""A model in another mode for some forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Inside, the model has no dropout. Afterwards all of it is in the mode that its root was in.

    Layers that are computed again in the backward pass (gradient checkpointing) still are: transformers asks the mode
    of the layer itself, which has no dropout of its own.
    """
    training = model.training
    model.eval()
    for layer in model.modules() if training else ():
        if getattr(layer, "gradient_checkpointing", False):
            layer.training = True
    try:
        yield
    finally:
        model.train(training)
