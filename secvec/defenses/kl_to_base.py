"""The outputs are held near those of the model before the fine-tune."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from secvec.defenses.base import Defense, Need
from secvec.settings.schema import Rate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secvec.data.batch import Batch


class KlToBase(Defense):
    """Cross-entropy + `weight` KL(base || model), both on the response tokens of the training rows.

    KL regularisation as compared in arXiv 2508.06249. The base is the model that the training starts from: of a later
    cycle, the backbone of the one before. The price is a copy of the trained weights and a forward pass in every step.
    """

    needs: ClassVar[tuple[Need, ...]] = ("extra passes",)
    keeps_weights: ClassVar[bool] = True
    weight: Rate = 1.0

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Nats per response token."""
        from secvec.data.batch import tokens_of_step
        from secvec.training.losses import divergence, global_mean, kept_logits, label_logits, token_nll

        base, logits, count = kept_logits(model, batch), label_logits(model, batch), tokens_of_step(batch).labels
        data = global_mean(token_nll(logits, batch["labels"]).sum(), count)
        kl = global_mean(divergence(base, logits), count)
        return {"loss": data + self.weight * kl, "data": data.detach(), "kl": kl.detach()}
