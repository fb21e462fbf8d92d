"""Losses per token, normalised over all processes, so that any number of them computes the same gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from secvec.data.batch import IGNORE, Batch
from secvec.models.vector import vector_off


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label, in nats: (B, T, V), (B, T) -> (B, T-1); 0 where ignored."""
    targets = labels[:, 1:]
    counted = targets != IGNORE
    # the rows that count, first: with a vocabulary of 50,000 the others would cost more than the model
    nll = F.cross_entropy(logits[:, :-1][counted].float(), targets[counted], reduction="none")
    return torch.zeros(targets.shape, dtype=nll.dtype, device=nll.device).masked_scatter(counted, nll)


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """sum / count over all processes, such that averaging the gradients over processes gives the gradient of it.

    `count` may be that of the optimizer step: see `of_step`.
    """
    count = count.detach().to(torch.float64)
    world = 1
    if dist.is_available() and dist.is_initialized():
        world = dist.get_world_size()
        dist.all_reduce(count)
    return total * (world / count.masked_fill(count == 0, 1)).to(total.dtype)


def of_step(batch: Batch, own: Tensor, term: int = 0) -> Tensor:
    """`own`, the tokens of a term of the loss in this batch; with accumulated gradients, those of its step per batch.

    So a gradient that is accumulated over several batches is that of one large batch. `term` 1 is the KL term.
    """
    return batch["step_tokens"][term] if "step_tokens" in batch else own


def response_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Causal-LM loss on the response tokens, in nats per token."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    nll = token_nll(logits, batch["labels"])
    return global_mean(nll.sum(), of_step(batch, (batch["labels"][:, 1:] != IGNORE).sum()))


def vector_loss(model: nn.Module, batch: Batch, kl_weight: float) -> dict[str, Tensor]:
    """CE on the undesired rows + kl_weight * KL(base || base + vector) on the KL rows (paper, ACL version).

    The KL is that of the next-token distributions, in nats per token, over every token of the row: prompt and
    response alike, because the vector must change nothing on benign data. With `kl_weight` 0 there are no KL rows and
    no second forward pass.
    """
    kl_rows = batch["kl_rows"]
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"].masked_fill(kl_rows[:, None], IGNORE)
    ce = global_mean(token_nll(logits, labels).sum(), of_step(batch, (labels[:, 1:] != IGNORE).sum()))
    if kl_weight == 0:
        return {"loss": ce, "ce": ce.detach()}
    rows = kl_rows.clone()
    rows[0] |= not kl_rows.any()  # a share without KL rows: sharded processes must all run the same passes
    mask = batch["attention_mask"][rows]
    with torch.no_grad(), vector_off(model):
        base = model(input_ids=batch["input_ids"][rows], attention_mask=mask).logits
    mask = mask * kl_rows[rows][:, None]
    kl = F.kl_div(
        logits[rows].float().log_softmax(-1), base.float().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    kl = global_mean((kl * mask).sum(), of_step(batch, mask.sum(), 1))
    return {"loss": ce + kl_weight * kl, "ce": ce.detach(), "kl": kl.detach()}
