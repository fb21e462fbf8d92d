"""Defenses of the alignment stage: they train the starting model once more, before it meets the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from secvec.defenses.base import Defense, Need, Preparation
from secvec.settings.schema import Count, Rate

if TYPE_CHECKING:
    from secvec.models.backbone import Backbone
    from secvec.run import Run


class AlignmentStage(Defense):
    """The base of such defenses. The fine-tune that follows is the plain one.

    The training reads the starting model's own answers to the vector's prompts (its refusals, as far as it refuses) and
    the vector's KL rows; beside them, where `undesired_batch_size` is given, the vector's undesired samples.
    """

    needs: ClassVar[tuple[Need, ...]] = ("undesired samples", "safe samples")
    uses_samples: bool = True
    epochs: Count = 5
    batch_size: Count = 16
    lr: Rate
    undesired_batch_size: int = 0

    def hardening(self) -> Defense:
        """The defense whose loss and gradients make this training: each subclass has its own."""
        raise NotImplementedError

    def starting(self, run: Run) -> Backbone:
        """The starting model after this training, which other runs find in the cache."""
        samples = run.data.vector_samples
        rows = [*run.own_answers(samples["undesired"]), *samples["kl"]]
        undesired = samples["undesired"] if self.undesired_batch_size else []
        hardening = self.hardening().model_copy(update={"extra_batch_size": self.undesired_batch_size})
        plan = Preparation(hardening, rows, undesired, self.epochs, self.batch_size, self.lr)
        return run.backbone.at(run.prepare(plan) / "backbone")
