"""A model in another mode for some forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

RECOMPUTED = "recomputed_in_eval"
"""The mark of a layer that is in training mode only to be computed again in the backward pass."""


@contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode. Afterwards all of it is in the mode that its root was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Inside, a model in eval mode computes its checkpointed layers again in the backward pass, as in training.

    transformers asks the mode of the layer itself, which is therefore in training mode here, without dropout or layer
    drop of its own. Not for generation: such a layer reads no cache of keys and values.
    """
    changed = list[tuple[nn.Module, dict[str, float]]]()
    for layer in () if model.training else model.modules():
        if getattr(layer, "gradient_checkpointing", False):
            own = {name: rate for name, rate in vars(layer).items() if "drop" in name and isinstance(rate, float)}
            vars(layer).update(dict.fromkeys(own, 0.0), training=True, **{RECOMPUTED: True})
            changed.append((layer, own))
    try:
        yield
    finally:
        for layer, own in changed:
            vars(layer).update(own, training=False)
            del vars(layer)[RECOMPUTED]
