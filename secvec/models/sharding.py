"""FSDP2: a model sharded over processes, and its weights as one process sees them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from secvec.models.outline import Weights, fill, inside_peft, layers, tensors_of
from secvec.runs.processes import from_first, main_process


def shard(model: nn.Module, mesh: Any) -> None:
    """Shards each transformer layer on its own, then the rest. An outlined model is read layer by layer.

    `mesh` is Lightning's, (data parallel, tensor parallel). With several in both it is one of copies and their shards.
    """
    mesh = mesh["data_parallel"] if mesh["tensor_parallel"].size() == 1 else mesh
    for layer in layers(model):
        fill(tensors_of(layer))
        fully_shard(layer, mesh=mesh)
    root: nn.Module = inside_peft(model)
    fill(tensors_of(root))
    fully_shard(root, mesh=mesh)


def reshard(model: nn.Module) -> None:
    """Back to shards: FSDP2 leaves the root whole after a forward pass that no backward pass follows."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def in_step(model: nn.Module) -> Iterator[None]:
    """Inside, each process runs a sharded model as often as it needs to. Every process must enter.

    A layer is gathered by all processes together. So one that has no work left goes on with a single token, until all
    have ended. A model that is not sharded runs as always.
    """
    root: nn.Module = inside_peft(model)
    if not isinstance(root, FSDPModule):
        yield
        return
    device = next(root.parameters()).device

    def running(own: bool) -> bool:
        """Tells all processes whether this one runs the model now, and returns whether any of them does."""
        told = torch.tensor(int(own), device=device)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        return bool(told)

    def before(*_: Any) -> None:  # a value would be taken for the model's input
        running(True)

    hook = root.register_forward_pre_hook(before, prepend=True)
    try:
        yield
    finally:
        hook.remove()
    token = torch.ones(1, 1, dtype=torch.long, device=device)
    with torch.no_grad():
        while running(False):
            root(input_ids=token, attention_mask=token, use_cache=False)
    reshard(root)


def local_shard(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def over_shards(total: Tensor, model: nn.Module) -> Tensor:
    """`total`, summed over the processes that hold the shards of `model`; what copies hold counts once."""
    sharded = next((p for p in model.parameters() if isinstance(p, DTensor)), None)
    if sharded is not None:
        dist.all_reduce(total)
        mesh = sharded.device_mesh
        total /= dist.get_world_size() // mesh.size(mesh.ndim - 1)
    return total


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights and the buffers, unsharded, on the CPU of rank 0 (empty elsewhere when sharded).

    For adapters: they are small. Every process must call it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def on_first(tensors: Mapping[str, Tensor], work: Callable[[Weights], None]) -> None:
    """The first process does `work` with the weights; each that it reads is gathered by all processes together.

    So none of them holds more than the first one keeps. Every process must call it, with the same names.
    """
    sharded = next((tensor for tensor in tensors.values() if isinstance(tensor, DTensor)), None)
    if sharded is None:
        if main_process():
            work(Weights.of(tensors))
        return
    names, end = list(tensors), -1

    def read(name: str) -> Tensor:
        from_first(lambda: names.index(name))
        return _gathered(tensors[name])

    if main_process():
        try:
            work(Weights(tensors, read))
        finally:
            from_first(lambda: end)
    else:
        while (number := from_first(lambda: end)) != end:
            _gathered(tensors[names[number]])


def _gathered(tensor: Tensor) -> Tensor:
    """A tensor, whole, on the CPU. Every process must call it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
