"""FSDP2: a model sharded over processes, and its weights as one process sees them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor


def shard(model: nn.Module, mesh: Any) -> None:
    """Shards each transformer layer on its own, then the rest."""
    for layer in (layer for layers in layer_lists(model) for layer in layers):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def layer_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of transformer layers: one, unless the model can see."""
    return [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) and m[0].__class__.__name__.endswith(("Layer", "Block"))
    ]


def reshard(model: nn.Module) -> None:
    """Back to shards: FSDP2 leaves a module whole after a forward pass that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def gather_root(model: nn.Module, input_ids: Tensor) -> None:
    """Makes the weights that are in no layer whole, for `generate`; `reshard` undoes it.

    `generate` calls the model inside PEFT's wrapper and so misses the hook of the wrapper, which FSDP2 has sharded as
    the root. One forward pass of the root gathers them.
    """
    if isinstance(model, FSDPModule):
        model(input_ids=input_ids)


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """All weights, unsharded, on the CPU of rank 0 (empty elsewhere when sharded). Every process must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))
