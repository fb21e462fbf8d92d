"""The weights are held near those before the fine-tune."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from secvec.defenses.base import Defense
from secvec.settings.schema import Rate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secvec.data.batch import Batch


class L2ToBase(Defense):
    """Loss + `weight` ||theta - theta_0||^2 over the trained parameters: L2-SP (Li et al., arXiv 1802.01483, eq. 2).

    Theirs has the factor `weight`/2 and a plain penalty on the new head; here there is no new head. theta_0 is where
    the training starts. The logged loss is that of the data; the penalty enters by its gradient, 2 `weight` (theta -
    theta_0), before clipping. The price is a copy of the trained weights.
    """

    keeps_weights: ClassVar[bool] = True
    weight: Rate = 0.01

    def gradients(self, model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
        """Adds that of the penalty. Logged: `distance`, ||theta - theta_0||."""
        from secvec.models.kept import trained_and_kept
        from secvec.training.gradients import inner, present_gradient

        moved = [now - kept for _, now, kept in trained_and_kept(model)]
        for gradient, apart in zip(present_gradient(model), moved, strict=True):
            gradient.add_(apart, alpha=2 * self.weight)
        return {"distance": inner(model, moved, moved).sqrt()}
