"""A copy of the trained weights beside the model: what a defense pulls them towards, or compares them with.

It is a part of the model of its own (`kept`): frozen, sharded as the weights are, and in every checkpoint. It costs the
memory of the trained weights once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secvec.models.sharding import local_shard, reshard


def keep_weights(model: Any) -> None:
    """Keeps the trained weights of `model` as they are now. After sharding: the copy has the same shards."""
    trained = [p for p in model.parameters() if p.requires_grad]
    model.kept = nn.ParameterList(nn.Parameter(p.detach().clone(), requires_grad=False) for p in trained)


def trained_and_kept(model: Any) -> list[tuple[nn.Parameter, Tensor, Tensor]]:
    """(parameter, its values, the kept values) of each trained parameter; of shards, the own one. Writes go through."""
    trained = [p for p in model.parameters() if p.requires_grad]
    pairs = zip(trained, model.kept, strict=True)
    return [(p, local_shard(p.detach()), local_shard(kept.detach())) for p, kept in pairs]


@contextmanager
def with_kept_weights(model: nn.Module) -> Iterator[None]:
    """Inside, the model has the kept weights. For forward passes without a gradient, before those that have one."""
    _swap(model)
    try:
        yield
    finally:
        _swap(model)


@torch.no_grad()
def _swap(model: nn.Module) -> None:
    reshard(model)  # whole copies of shards would keep the old values
    for _, now, kept in trained_and_kept(model):
        before = now.clone()
        now.copy_(kept)
        kept.copy_(before)
