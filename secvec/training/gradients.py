"""Gradients beside that of the training step, for a defense that compares or combines them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from secvec.models.sharding import local_shard, over_shards


def gradient_of(model: nn.Module, losses: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    """The gradient of the mean of `losses`, a tensor per trained parameter: over all processes; of shards, the own one.

    The mean, as Lightning takes it over accumulated batches. `p.grad` stays what it is. Every process must call it with
    as many losses. A loss is a function, so that there is one graph at a time.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.grad for p in trained]
    for p in trained:
        p.grad = None
    for loss in losses:
        (loss() / len(losses)).backward()
    found = [torch.zeros_like(local_shard(p.detach())) if p.grad is None else local_shard(p.grad) for p in trained]
    for p, gradient, old in zip(trained, found, before, strict=True):
        p.grad = old
        if dist.is_initialized() and not isinstance(p, DTensor):  # DDP averages those of the training step alone
            dist.all_reduce(gradient)
            gradient /= dist.get_world_size()
    return found


def present_gradient(model: nn.Module) -> list[Tensor]:
    """`p.grad` of each trained parameter; of shards, the own one. Writing to it changes the step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return [local_shard(p.grad) for p in trained if p.grad is not None]


def inner(model: nn.Module, a: Iterable[Tensor], b: Iterable[Tensor]) -> Tensor:
    """The inner product of two gradients of `model`, over all its parameters and shards, in float64."""
    return over_shards(torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum(), model)
