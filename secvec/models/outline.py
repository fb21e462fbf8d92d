"""A model whose weights stay on disk, for processes that shard it: none of them ever holds it whole.

Each weight is one number, seen as a tensor of the right shape (stride 0). So it takes no memory, and PEFT attaches
adapters to it as to any model on the CPU. (On the meta device it would move the adapters there, without their values.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn


@dataclass(frozen=True)
class Weights:
    """The weights of a model by name, each of which is read when it is asked for: all of them may be too much."""

    tensors: Mapping[str, Tensor]
    """Their shapes and types; the values may be elsewhere: on disk, or in the shards of other processes."""
    read: Callable[[str], Tensor]
    """One of them, whole and on the CPU."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Weights:
        """Of those in memory."""
        return cls(tensors, lambda name: tensors[name].detach().cpu())

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name)

    def whole(self) -> dict[str, Tensor]:
        """All of them, in memory."""
        return {name: self.read(name) for name in self.tensors}


def outlined(model: Any, folder: Path) -> bool:
    """Replaces the meta weights of `model` by outlines that are read from `folder` when they are needed.

    Returns False, and changes nothing, where the files hold other names or shapes (old names, experts one by one):
    transformers converts these when it loads them.
    """
    files, tensors = _files(folder), dict(_tensors(model))
    shapes = {name: file.get_slice(name).get_shape() for name, file in files.items()}
    if any(shapes.get(name) != list(tensor.shape) for name, tensor in tensors.items()):
        return False
    for name, buffer in model.named_non_persistent_buffers():  # they are in no file: the model computes them
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        setattr(module, leaf, torch.empty_like(buffer, device="cpu"))
        module._is_hf_initialized = False
    model.initialize_weights()
    _tie_equal(model, files)
    made: dict[Tensor, Tensor] = {}
    for name, tensor in _tensors(model):
        hollow = _hollow(tensor)
        made[tensor] = hollow if not isinstance(tensor, nn.Parameter) else nn.Parameter(hollow, tensor.requires_grad)
        made[tensor].read = partial(_read, files[name], name, tensor.dtype)  # type: ignore[attr-defined]
    for module in model.modules():
        for leaf, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor in made:  # tied weights stay tied
                setattr(module, leaf, made[tensor])
    return True


def _tie_equal(model: Any, files: Mapping[str, Any]) -> None:
    """Ties weights that the config ties and that lie in the files twice, as loading does: it compares their values."""
    for target, source in (model.all_tied_weights_keys or {}).items():
        if target in files and source in files:
            one, other = (files[name].get_tensor(name) for name in (target, source))
            if torch.equal(one, other):
                owner, _, leaf = target.rpartition(".")
                setattr(model.get_submodule(owner), leaf, model.get_parameter(source))


def is_outlined(model: nn.Module) -> bool:
    """Whether weights of `model` are on disk."""
    return any(hasattr(tensor, "read") for tensor in tensors_of(model))


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers of `module`."""
    return [*module.parameters(), *module.buffers()]


def fill(tensors: Iterable[Tensor]) -> None:
    """Reads the weights of those that are outlined; others stay as they are."""
    for tensor in tensors:
        if hasattr(tensor, "read"):
            tensor.data = tensor.read()


@contextmanager
def weights_at_hand(model: nn.Module) -> Iterator[None]:
    """Inside, each layer of an outlined model reads its weights before its forward pass and frees them after it."""
    inside = layers(model)
    there = {id(tensor) for layer in inside for tensor in tensors_of(layer)}
    rest = [tensor for tensor in tensors_of(model) if id(tensor) not in there]
    fill(rest)
    hooks = [layer.register_forward_pre_hook(lambda layer, _: fill(tensors_of(layer))) for layer in inside]
    hooks += [layer.register_forward_hook(lambda layer, *_: _drop(tensors_of(layer))) for layer in inside]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        _drop(tensors_of(model))


def inside_peft(model: Any) -> Any:
    """The model inside PEFT's wrapper, or `model` where there is none."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_part(model: Any) -> nn.Module:
    """The part of a causal LM that a text passes through, without the head: a vision-language model has more."""
    bare = inside_peft(model)
    decoder: nn.Module = bare.get_decoder() if hasattr(bare, "get_decoder") else bare
    return decoder


def layer_lists(model: nn.Module) -> list[nn.ModuleList]:
    """The lists of transformer layers: one, more in a vision-language model."""
    return [
        m
        for m in model.modules()
        if isinstance(m, nn.ModuleList) and len(m) and m[0].__class__.__name__.endswith(("Layer", "Block"))
    ]


def layers(model: nn.Module) -> list[nn.Module]:
    """The transformer layers of `model`, in order."""
    return [layer for found in layer_lists(model) for layer in found]


def _drop(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        if hasattr(tensor, "read"):
            tensor.data = _hollow(tensor)


def _hollow(tensor: Tensor) -> Tensor:
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and values of all that is saved, tied weights once."""
    saved = model.state_dict(keep_vars=True).keys()
    return ((name, t) for name, t in chain(model.named_parameters(), model.named_buffers()) if name in saved)


def _files(folder: Path) -> dict[str, Any]:
    """The open file of each tensor in `folder`."""
    whole = folder / "model.safetensors"
    paths = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
    opened = [safe_open(path, framework="pt") for path in paths]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118


def _read(file: Any, name: str, dtype: torch.dtype) -> Tensor:
    tensor: Tensor = file.get_tensor(name)
    return tensor.to(dtype)
