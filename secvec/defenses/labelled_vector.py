"""A security vector that is active only for the samples labelled undesired."""

from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from secvec.data.batch import IGNORE, Batch
from secvec.defenses.base import Defense
from secvec.models.vector import vector_off
from secvec.training.losses import global_mean, of_step, token_losses


class LabelledVector(Defense):
    """Shows what labels are worth: without them the vector must be active on benign data too."""

    uses_vector: bool = True
    needs_labels: ClassVar[bool] = True

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Nats per response token. The vector is off in the forward pass of the benign rows."""
        undesired = batch["undesired"]
        total = torch.zeros((), device=batch["labels"].device)
        for mine, state in ((undesired, nullcontext()), (~undesired, vector_off(model))):
            rows = mine.clone()
            rows[0] |= not mine.any()  # even without such rows: sharded processes must all run the same forward passes
            labels = batch["labels"][rows].masked_fill(~mine[rows][:, None], IGNORE)
            ids, mask = batch["input_ids"][rows], batch["attention_mask"][rows]
            part: Batch = {**batch, "input_ids": ids, "attention_mask": mask, "labels": labels}
            with state:
                total = total + token_losses(model, part).sum()
        return {"loss": global_mean(total, of_step(batch, (batch["labels"][:, 1:] != IGNORE).sum()))}
