"""The base of all defenses. A defense decides what is active during fine-tuning, the stage what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from secvec.settings.schema import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secvec.data.batch import Batch


class Defense(Settings):
    """A defense without effect, and the base of all others.

    Its fields are its settings (one yaml in conf/defense/). Only the finetune stage calls its methods.
    """

    name: str
    uses_vector: bool = False
    """Whether the run has a vector stage, which trains the vector for `attach`. A defense without one says
    `uses_vector: false` in its yaml: no setting of the vector then counts for the key of its runs."""

    needs_labels: ClassVar[bool] = False
    """Whether `loss` must know which rows are undesired: `batch["undesired"]`."""

    refits_vector: ClassVar[bool] = False
    """Whether a new vector is trained on the backbone before each cycle after the first."""

    def attach(self, model: nn.Module, vector: Path | None) -> nn.Module:
        """The model to fine-tune. Everything that the defense adds is frozen.

        `vector` is the adapter folder, if there is one. Default: with `uses_vector` the frozen vector is active in
        every forward pass; else the model is unchanged.
        """
        if not self.uses_vector:
            return model
        from secvec.models.vector import attach_frozen_vector  # slow to import, and settings need none of it

        assert vector is not None, "the finetune stage passes the vector of the vector stage"
        return attach_frozen_vector(model, vector)

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Scalars by name: `loss` is minimised, the others are logged. Default: nats per response token."""
        from secvec.training.losses import response_loss  # slow to import, and settings need none of it

        return {"loss": response_loss(model, batch)}
