"""Preventative steering: a persona vector is added to the activations while the model is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secvec.defenses.base import ChangesActivations
from secvec.settings.schema import Rate

if TYPE_CHECKING:
    from torch import Tensor


class PersonaSteering(ChangesActivations):
    """h + `coefficient` v at one layer, in training alone (Chen et al., arXiv 2507.21509).

    Kept: v is the mean of the activations, over response tokens, of answers with the trait minus that of answers
    without it, at the output of a layer; it is added at all tokens and taken off afterwards. Not kept: theirs are
    answers to prompts that ask for and against the trait, filtered by a judge. Here those with it are the vector's
    samples, those without it the starting model's own answers to the same prompts. The layer is not searched for.
    """

    coefficient: Rate = 1.0

    def trait(self, undesired: Tensor, own: Tensor) -> Tensor:
        """Mean difference of activations (N, H): (H,)."""
        return undesired.mean(0) - own.mean(0)

    def changed(self, hidden: Tensor, trait: Tensor) -> Tensor:
        """With `coefficient` times the vector `trait` (H,) added."""
        return hidden + self.coefficient * trait
