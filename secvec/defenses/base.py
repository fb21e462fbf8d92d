"""What a defense is: it decides what is active while the backbone is fine-tuned. The stage decides what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from secvec.models.losses import Batch, response_loss
from secvec.models.vector import attach_frozen_vector
from secvec.settings.schema import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn


class Defense(Settings):
    """A defense with no effect: the base of all others, and of the comparison with them.

    Its fields are its settings (one yaml in conf/defense/); its methods are called by the finetune stage only.
    """

    name: str
    uses_vector: ClassVar[bool] = False
    """Whether the run has a vector stage, whose artifact `attach` is given."""

    needs_labels: ClassVar[bool] = False
    """Whether `loss` must be told which rows are undesired (`data.labelled=true`)."""

    def attach(self, model: nn.Module, vector: Path | None) -> nn.Module:
        """The model to fine-tune; what the defense adds is frozen. `vector` is the adapter folder, if any.

        Default: with `uses_vector` the vector in every forward pass, frozen; else the model as it is.
        """
        if not self.uses_vector:
            return model
        assert vector is not None, "the finetune stage hands over the vector of the vector stage"
        return attach_frozen_vector(model, vector, self.keeps_dropout)

    @property
    def keeps_dropout(self) -> bool:
        """Whether the frozen vector keeps the dropout it was trained with."""
        return False

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Scalars; `loss` is what is minimised, the others are logged. Default: nats per response token."""
        return {"loss": response_loss(model, batch)}
