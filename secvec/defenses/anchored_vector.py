"""A security vector and an anchor: some rows of every batch are read without the vector.

The vector takes the gradient of the undesired samples only as long as they fit it, and under high rates the backbone
drifts until the vector no longer elicits the behavior, and loses its refusals. The anchor holds what the model shall do
*without* the vector, from samples that the defender has already: no label and no new data are needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from secvec.defenses.base import Defense, Need
from secvec.errors import ConfigError
from secvec.settings.schema import Count, Rate, Share, Window

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secvec.data.batch import Batch
    from secvec.data.example import Example
    from secvec.defenses.base import Mixture
    from secvec.run import Run


class AnchoredVector(Defense):
    """The loss of the paper, plus `weight` times the loss of `extra_batch_size` rows with the vector off.

    These rows are the vector's own prompts with the answers of the starting model (its refusals, as far as it refuses),
    and the vector's KL rows, which keep what it can do, also near the new task.
    """

    uses_vector: bool = True
    needs: ClassVar[tuple[Need, ...]] = ("undesired samples", "safe samples", "extra passes")
    extra_batch_size: Count = 8
    weight: Rate = 0.3
    every: Count = 1
    """The anchor is read in every such step, from the first one on; its weight is then that many times as high."""
    kl: bool = False
    """Whether its loss is KL(base || model) at the response tokens in place of cross-entropy; the base is the model
    that the training starts from. It costs a copy of the trained weights and one more forward pass of these rows."""
    answers: bool = True
    """Whether the starting model's answers to the vector's prompts are among the rows."""
    benign: bool = True
    """Whether the vector's KL rows are."""
    vector: bool = True
    """False: the anchor alone, a control."""
    drop_flagged: bool = False
    """Whether rows that the vector's scan flags are left out, as by `defense=scan_filter`."""
    window: Window = 3
    quantile: Share = 0.99

    def check(self, run: Run) -> None:
        """Raises ConfigError where the vector's samples do not suffice, or give no row, or its scan cannot flag."""
        super().check(run)
        self.check_samples(run)
        if not self.answers and not (self.benign and run.data.vector_samples["kl"]):
            raise ConfigError(
                f"defense={self.name} has no rows: set defense.answers=true, or defense.benign=true with vector.num_kl "
                "and vector.kl_weight above 0"
            )
        if self.drop_flagged:
            run.check_scan()

    @property
    def keeps_weights(self) -> bool:  # type: ignore[override]
        """For the KL."""
        return self.kl

    @property
    def needs_run(self) -> bool:
        """Only where rows are left out."""
        return self.drop_flagged

    def training_samples(self, run: Run, mixture: Mixture) -> Mixture:
        """All rows, or those that are not flagged."""
        return run.unflagged(mixture, self.window, self.quantile) if self.drop_flagged else mixture

    @property
    def vector_acts(self) -> bool:  # type: ignore[override]
        """Not for the anchor alone."""
        return self.vector

    def extra_samples(self, run: Run) -> list[Example]:
        """The starting model's answers to the vector's prompts, and the vector's KL rows."""
        samples = run.data.vector_samples
        return [*(run.own_answers() if self.answers else []), *(samples["kl"] * self.benign)]

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Nats per response token of the data with the vector on, and of the anchor, when it is read, with it off."""
        from secvec.models.vector import vector_off
        from secvec.training.losses import data_loss, extra_divergence, extra_loss

        if batch.get("step", 0) % self.every:
            data = data_loss(model, batch)
            return {"loss": data, "data": data.detach()}
        if self.kl:
            with vector_off(model):
                anchor = extra_divergence(model, batch)  # first: it writes into the weights
            data = data_loss(model, batch)
        else:
            data = data_loss(model, batch)
            with vector_off(model):
                anchor = extra_loss(model, batch)
        return {"loss": data + self.every * self.weight * anchor, "data": data.detach(), "anchor": anchor.detach()}
