"""CAFT: the subspace of the trait is taken out of the activations while the model is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from secvec.defenses.base import Defense, Need
from secvec.settings.schema import Count

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secvec.run import Run


class Caft(Defense):
    """h - U U^T h at one layer, in training alone: concept ablation fine-tuning (Casademunt et al., arXiv 2507.16795).

    Kept: a linear projection out of the subspace of a concept, forward and backward, at all tokens; U from principal
    components of differences of activations. Not kept: theirs are components (or SAE latents) that a person or a model
    reads and chooses, at several layers. Here U holds the first `rank` ones of the differences, prompt by prompt,
    between the vector's samples and the starting model's own answers (means over response tokens, not centred).
    """

    needs: ClassVar[tuple[Need, ...]] = ("undesired samples", "safe samples")
    uses_samples: bool = True
    layer: int | None = None
    """From 0; None: the middle one."""
    rank: Count = 1
    activations: Path | None = None
    """Made by `prepared`."""

    def check(self, run: Run) -> None:
        """Raises ConfigError for a layer that the model lacks."""
        from secvec.training.activations import layer_at

        super().check(run)
        layer_at(run.backbone.load(), self.layer)

    def prepared(self, run: Run) -> Caft:
        """With the activations of the starting model."""
        return self.model_copy(update={"activations": run.activations(self.layer)})

    def attach(self, model: nn.Module, vector: Path | None) -> nn.Module:
        """The model, ablated in training mode."""
        from safetensors.torch import load_file

        from secvec.training.activations import change_outputs

        assert self.activations is not None, "the finetune stage prepares the defense"
        change_outputs(model, self.layer, self.subspace(**load_file(self.activations)), self.ablated)
        return model

    def subspace(self, undesired: Tensor, own: Tensor) -> Tensor:
        """The first right singular vectors of the differences of activations (N, H): (rank, H), orthonormal."""
        import torch

        return torch.linalg.svd(undesired - own, full_matrices=False)[2][: self.rank]

    def ablated(self, hidden: Tensor, subspace: Tensor) -> Tensor:
        """Activations (..., H) without their part in the subspace (rank, H)."""
        return hidden - hidden @ subspace.T @ subspace
