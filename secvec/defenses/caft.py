"""CAFT: the subspace of the trait is taken out of the activations while the model is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secvec.defenses.base import ChangesActivations
from secvec.settings.schema import Count

if TYPE_CHECKING:
    from torch import Tensor


class Caft(ChangesActivations):
    """h - U U^T h at one layer, in training alone: concept ablation fine-tuning (Casademunt et al., arXiv 2507.16795).

    Kept: a linear projection out of the subspace of a concept, forward and backward, at all tokens; U from principal
    components of differences of activations. Not kept: theirs are components (or SAE latents) that a person or a model
    reads and chooses, at several layers. Here U holds the first `rank` ones of the differences, prompt by prompt,
    between the vector's samples and the starting model's own answers (means over response tokens, not centred).
    """

    rank: Count = 1

    def trait(self, undesired: Tensor, own: Tensor) -> Tensor:
        """The first right singular vectors of the differences of activations (N, H): (rank, H), orthonormal."""
        import torch

        return torch.linalg.svd(undesired - own, full_matrices=False)[2][: self.rank]

    def changed(self, hidden: Tensor, trait: Tensor) -> Tensor:
        """Without their part in the subspace `trait` (rank, H)."""
        return hidden - hidden @ trait.T @ trait
