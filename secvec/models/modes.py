"""A model in another mode for some forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Inside, the model has no dropout. Afterwards all of it is in the mode that its root was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
