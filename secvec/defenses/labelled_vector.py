"""A security vector for the samples labelled undesired alone; the others are learned without it."""

from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor, nn

from secvec.defenses.base import Defense
from secvec.models.losses import IGNORE, Batch, global_mean, token_nll
from secvec.models.vector import vector_off


class LabelledVector(Defense):
    """What labels are worth: the paper's vector must act on benign data too, because it cannot tell them apart."""

    uses_vector: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Nats per response token; the vector is off in the forward pass of the benign rows."""
        undesired = batch["undesired"]
        total = torch.zeros((), device=batch["labels"].device)
        for mine, state in ((undesired, nullcontext()), (~undesired, vector_off(model))):
            rows = mine.clone()
            rows[0] |= not mine.any()  # a share without such rows: sharded processes must all run the same passes
            with state:
                logits = model(input_ids=batch["input_ids"][rows], attention_mask=batch["attention_mask"][rows]).logits
            labels = batch["labels"][rows].masked_fill(~mine[rows][:, None], IGNORE)
            total = total + token_nll(logits, labels).sum()
        return {"loss": global_mean(total, (batch["labels"][:, 1:] != IGNORE).sum())}
