"""Losses per token, normalised over all processes, so that any number of them computes the same gradient."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from secvec.data.batch import IGNORE, Batch, tokens_of_step
from secvec.models.kept import with_kept_weights
from secvec.models.logits import logits_at, places_of
from secvec.models.modes import in_eval
from secvec.models.vector import vector_off


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label, in nats: (B, T) labels -> (B, T-1); 0 where ignored.

    `logits` (N, V) are those after the tokens that `before_labels(labels)` marks.
    """
    targets = labels[:, 1:]
    counted = targets != IGNORE
    given = targets[counted].to(logits.device, non_blocking=True)
    nll = F.cross_entropy(logits.float(), given, reduction="none")
    return nll.new_zeros(targets.numel()).index_copy(0, places_of(counted, nll.device), nll).view(targets.shape)


def divergence(base: Tensor, tuned: Tensor) -> Tensor:
    """KL(base || tuned) of next-token distributions, in nats, summed over tokens: logits (N, V) -> scalar."""
    log_base, log_tuned = base.float().log_softmax(-1), tuned.float().log_softmax(-1)
    return F.kl_div(log_tuned, log_base, log_target=True, reduction="sum")


def before_labels(labels: Tensor) -> Tensor:
    """The tokens whose next token carries a label: (B, T) labels -> (B, T) bool."""
    return F.pad(labels[:, 1:] != IGNORE, (0, 1))


def label_logits(model: nn.Module, batch: Batch) -> Tensor:
    """The logits (N, V) after the tokens whose next token carries a label."""
    return logits_at(model, batch["input_ids"], batch["attention_mask"], before_labels(batch["labels"]))


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Nats of each token with a label, under `model`: (B, T-1); 0 elsewhere."""
    return token_nll(label_logits(model, batch), batch["labels"])


def global_mean(total: Tensor, count: Tensor) -> Tensor:
    """sum / count over all processes, such that averaging the gradients over processes gives the gradient of it.

    `count` may be that of the optimizer step: see `tokens_of_step`.
    """
    # a copy: it is summed in place below, and the batches of a step share it
    count = count.detach().to(total.device, torch.float64, non_blocking=True, copy=True)
    world = 1
    if dist.is_initialized():
        world = dist.get_world_size()
        dist.all_reduce(count)
    return total * (world / count.masked_fill(count == 0, 1)).to(total.dtype)


def response_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Causal-LM loss on the response tokens, in nats per token."""
    count = tokens_of_step(batch)
    return global_mean(token_losses(model, batch).sum(), count.labels + count.extra_labels)


def at_least_one_row(rows: Tensor) -> Tensor:
    """`rows` (B,), and the first row where it marks none: sharded processes must all run the same forward passes."""
    some = rows.clone()
    some[0] |= not rows.any()
    return some


def rows_of(batch: Batch, mine: Tensor) -> Batch:
    """The rows `mine` (B,) of the batch; where there is none, one row without labels (see `at_least_one_row`)."""
    rows = at_least_one_row(mine)
    labels = batch["labels"][rows].masked_fill(~mine[rows][:, None], IGNORE)
    ids, mask = batch["input_ids"][rows], batch["attention_mask"][rows]
    return {**batch, "input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_of_rows(model: nn.Module, batch: Batch, mine: Tensor, count: Tensor) -> Tensor:
    """The nats of all labels in the rows `mine` (B,) of the batch, divided by `count` over all processes."""
    return global_mean(token_losses(model, rows_of(batch, mine)).sum(), count)


def data_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Nats per response token of the rows that are no extra ones."""
    return loss_of_rows(model, batch, ~batch["extra"], tokens_of_step(batch).labels)


def extra_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Nats per response token of the extra rows."""
    return loss_of_rows(model, batch, batch["extra"], tokens_of_step(batch).extra_labels)


def kept_logits(model: nn.Module, batch: Batch) -> Tensor:
    """`label_logits` of the weights that are kept beside the model, without a gradient and without dropout.

    Call it before the forward passes that have a gradient: it writes the kept weights into the model and back.
    """
    with torch.no_grad(), in_eval(model), with_kept_weights(model):
        return label_logits(model, batch)


def extra_divergence(model: nn.Module, batch: Batch) -> Tensor:
    """KL(kept || present) of the extra rows, in nats per response token."""
    rows = rows_of(batch, batch["extra"])
    base = kept_logits(model, rows)
    return global_mean(divergence(base, label_logits(model, rows)), tokens_of_step(batch).extra_labels)


def vector_loss(model: nn.Module, batch: Batch, kl_weight: float) -> dict[str, Tensor]:
    """CE on the undesired rows + kl_weight * KL(base || base + vector) on the KL rows (paper, ACL version).

    The KL is that of the next-token distributions, in nats per token, over every token of the row: prompt and
    response alike, because the vector must change nothing on benign data. The base is read without dropout. With
    `kl_weight` 0 there are no KL rows and no second forward pass.
    """
    input_ids, mask, kl_rows = batch["input_ids"], batch["attention_mask"], batch["extra"]
    labels = batch["labels"].masked_fill(kl_rows[:, None], IGNORE)
    of_ce, of_kl = before_labels(labels), mask.bool() & kl_rows[:, None] & (kl_weight != 0)
    at = of_ce | of_kl
    logits = logits_at(model, input_ids, mask, at)
    nll = token_nll(logits[places_of(of_ce[at], logits.device)], labels)
    ce = global_mean(nll.sum(), tokens_of_step(batch).labels)
    if kl_weight == 0:
        return {"loss": ce, "ce": ce.detach()}
    rows = at_least_one_row(kl_rows)
    with torch.no_grad(), in_eval(model), vector_off(model):
        base = logits_at(model, input_ids[rows], mask[rows], of_kl[rows])
    total = divergence(base, logits[places_of(of_kl[at], logits.device)])
    kl = global_mean(total, tokens_of_step(batch).extra)
    return {"loss": ce + kl_weight * kl, "ce": ce.detach(), "kl": kl.detach()}
