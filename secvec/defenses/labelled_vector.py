"""A security vector that is active only for the samples labelled undesired."""

from typing import ClassVar

from torch import Tensor, nn

from secvec.data.batch import Batch, tokens_of_step
from secvec.defenses.base import Defense, Need
from secvec.models.vector import vector_off
from secvec.training.losses import loss_of_rows


class LabelledVector(Defense):
    """Shows what labels are worth: without them the vector must be active on benign data too."""

    uses_vector: bool = True
    needs: ClassVar[tuple[Need, ...]] = ("labels", "undesired samples", "safe samples")

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Nats per response token. The vector is off in the forward pass of the benign rows."""
        undesired, count = batch["undesired"], tokens_of_step(batch).labels
        on = loss_of_rows(model, batch, undesired, count)
        with vector_off(model):
            off = loss_of_rows(model, batch, ~undesired, count)
        return {"loss": on + off}
