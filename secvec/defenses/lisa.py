"""Lisa: steps on safe samples and steps on the data take turns, each held near where the other ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from secvec.defenses.base import Defense, Need
from secvec.settings.schema import Count, Weight

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secvec.data.batch import Batch
    from secvec.data.example import Example
    from secvec.run import Run


class Lisa(Defense):
    """Lazy safety alignment (Huang et al., arXiv 2405.18641): `safe_steps` on safe samples, `data_steps` on the data.

    Both minimise their loss + `rho`/2 ||theta - theta_t||^2, theta_t being the weights at the last turn. As in the
    authors' code the turns begin with safe samples, and a batch of the data that comes in their turn is left out, so
    that the number of steps is that of the plain fine-tune. Not kept: their code lets the first tenth of the steps go
    without the penalty. Here the safe samples are the starting model's own answers to the vector's prompts, and the
    defaults are a tenth of the paper's 100 and 900 steps, for short trainings.
    """

    needs: ClassVar[tuple[Need, ...]] = ("undesired samples", "safe samples")
    uses_samples: bool = True
    keeps_weights: ClassVar[bool] = True
    longest_step: ClassVar[int] = -1  # the last one, of a turn of the data
    extra_batch_size: Count = 8
    safe_steps: Count = 10
    data_steps: Count = 90
    rho: Weight = 1.0

    def extra_samples(self, run: Run) -> list[Example]:
        """The starting model's answers to the vector's prompts."""
        return run.own_answers()

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Nats per response token of those rows whose turn it is. The penalty enters by its gradient."""
        from secvec.training.losses import data_loss, extra_loss

        loss = extra_loss if self._turn(batch) < self.safe_steps else data_loss
        return {"loss": loss(model, batch)}

    def gradients(self, model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
        """Adds `rho` (theta - theta_t), after theta_t was set again in the first step of a turn."""
        from secvec.models.kept import trained_and_kept
        from secvec.training.gradients import present_gradient

        begins = self._turn(batches[0]) in (0, self.safe_steps)
        for gradient, (_, now, kept) in zip(present_gradient(model), trained_and_kept(model), strict=True):
            if begins:
                kept.copy_(now)
            gradient.add_(now - kept, alpha=self.rho)
        return {}

    def _turn(self, batch: Batch) -> int:
        """The step within a round of both turns."""
        return batch["step"] % (self.safe_steps + self.data_steps)
