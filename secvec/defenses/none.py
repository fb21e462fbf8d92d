"""The plain fine-tune: nothing is attached, nothing is added to the loss."""

from secvec.defenses.base import Defense


class NoDefense(Defense):
    """Bitwise the training of the bare model."""
