"""Rows of token ids and padded batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
PAD = 0
"""The id in padded places. They are masked, so any id serves; a tokenizer's own may be beyond the embedding."""


class TokenCounts(NamedTuple):
    """Tokens that the terms of a loss are divided by, each a scalar."""

    labels: Tensor
    """Those with a label in the rows of the stage."""
    extra: Tensor
    """All of the extra rows."""
    extra_labels: Tensor
    """Those with a label in the extra rows."""


class Batch(TypedDict):
    """A padded batch; B rows of T tokens.

    It stays on the host: `secvec.models.logits` gives the device what the model reads of it.
    """

    input_ids: Tensor
    """(B, T) int64"""
    attention_mask: Tensor
    """(B, T) int64, 1 where there is a token"""
    labels: Tensor
    """(B, T) int64, the token on response positions, -100 elsewhere"""
    extra: Tensor
    """(B,) bool, rows beside the samples of the stage: those of the KL term (vector), of an anchor (finetune)"""
    undesired: Tensor
    """(B,) bool, rows that are labelled undesired; all False where labels are hidden (`data.labelled=false`)"""
    step: NotRequired[int]
    """Optimizer steps that the training has done before this batch"""
    step_tokens: NotRequired[TokenCounts]
    """Only where the loss is that of several batches: the mean of their `count_tokens`"""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of prompt + response; the first `num_prompt` are the prompt's and carry no loss."""

    input_ids: Sequence[int]
    num_prompt: int
    undesired: bool = False
    """Whether the row is labelled undesired; False too where labels are hidden."""


def collate(rows: Sequence[tuple[Encoded, bool]]) -> Batch:
    """Right-padded batch of (row, is it an extra row)."""
    length = max(len(row.input_ids) for row, _ in rows)
    input_ids = torch.full((len(rows), length), PAD)
    labels = torch.full((len(rows), length), IGNORE)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for i, (row, _) in enumerate(rows):
        ids = torch.as_tensor(np.asarray(row.input_ids, dtype=np.int64))
        input_ids[i, : len(ids)] = ids
        labels[i, row.num_prompt : len(ids)] = ids[row.num_prompt :]
        mask[i, : len(ids)] = 1
    extra = torch.tensor([is_extra for _, is_extra in rows])
    undesired = torch.tensor([row.undesired for row, _ in rows])
    return Batch(input_ids=input_ids, attention_mask=mask, labels=labels, extra=extra, undesired=undesired)


def count_tokens(batch: Batch) -> TokenCounts:
    """The token counts of this batch."""
    labelled, extra = batch["labels"][:, 1:] != IGNORE, batch["extra"]
    return TokenCounts(labelled[~extra].sum(), batch["attention_mask"][extra].sum(), labelled[extra].sum())


def tokens_of_step(batch: Batch) -> TokenCounts:
    """The token counts of this batch; with accumulated gradients, the mean over the batches of its optimizer step.

    So a gradient that is accumulated over several batches is that of one large batch.
    """
    return batch["step_tokens"] if "step_tokens" in batch else count_tokens(batch)


def count_together(batches: Sequence[Batch]) -> None:
    """Tells each of `batches` the tokens of all: the mean of their losses is then that of one large batch."""
    if len(batches) > 1:
        counts = TokenCounts(*(torch.stack(n).double().mean() for n in zip(*map(count_tokens, batches), strict=True)))
        for batch in batches:
            batch["step_tokens"] = counts
