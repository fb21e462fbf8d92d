"""Preventative steering: a persona vector is added to the activations while the model is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from secvec.defenses.base import Defense, Need
from secvec.settings.schema import Rate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secvec.run import Run


class PersonaSteering(Defense):
    """h + `coefficient` v at one layer, in training alone (Chen et al., arXiv 2507.21509).

    Kept: v is the mean of the activations, over response tokens, of answers with the trait minus that of answers
    without it, at the output of a layer; it is added at all tokens and taken off afterwards. Not kept: theirs are
    answers to prompts that ask for and against the trait, filtered by a judge. Here those with it are the vector's
    samples, those without it the starting model's own answers to the same prompts. The layer is not searched for.
    """

    needs: ClassVar[tuple[Need, ...]] = ("undesired samples", "safe samples")
    uses_samples: bool = True
    layer: int | None = None
    """From 0; None: the middle one."""
    coefficient: Rate = 1.0
    activations: Path | None = None
    """Made by `prepared`."""

    def check(self, run: Run) -> None:
        """Raises ConfigError for a layer that the model lacks."""
        from secvec.training.activations import layer_at

        super().check(run)
        layer_at(run.backbone.load(), self.layer)

    def prepared(self, run: Run) -> PersonaSteering:
        """With the activations of the starting model."""
        return self.model_copy(update={"activations": run.activations(self.layer)})

    def attach(self, model: nn.Module, vector: Path | None) -> nn.Module:
        """The model, steered in training mode."""
        from safetensors.torch import load_file

        from secvec.training.activations import change_outputs

        assert self.activations is not None, "the finetune stage prepares the defense"
        change_outputs(model, self.layer, self.persona(**load_file(self.activations)), self.steered)
        return model

    def persona(self, undesired: Tensor, own: Tensor) -> Tensor:
        """Mean difference of activations (N, H): (H,)."""
        return undesired.mean(0) - own.mean(0)

    def steered(self, hidden: Tensor, persona: Tensor) -> Tensor:
        """Activations (..., H) with the vector (H,) added."""
        return hidden + self.coefficient * persona
