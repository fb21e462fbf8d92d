"""The outputs of a transformer layer: read over the answers of some rows, or changed while a model is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secvec.data.batch import IGNORE, Batch
from secvec.errors import ConfigError
from secvec.models.modes import RECOMPUTED
from secvec.models.outline import layer_lists, layers, text_part

Change = Callable[[Tensor, Tensor], Tensor]
"""The outputs of a layer (..., H) and the directions that it is changed by -> the changed outputs."""


def layer_at(model: nn.Module, number: int | None) -> nn.Module:
    """The layer with that number, from 0; None: the middle one. Raises ConfigError where there is none."""
    (layers, *_) = layer_lists(text_part(model)) or [nn.ModuleList()]
    if not len(layers) or not -len(layers) <= (number or 0) < len(layers):
        raise ConfigError(
            f"defense.layer={number}: the model has {len(layers)} layers, counted from 0; null: the middle"
        )
    return layers[len(layers) // 2 if number is None else number]


@torch.no_grad()
def mean_outputs(model: Any, number: int | None, batches: Iterable[Batch]) -> Tensor:
    """The mean output of a layer over the response tokens of each row: (rows, H), float32, on the CPU."""
    means: list[Tensor] = []
    read: list[Tensor] = []
    hook = layer_at(model, number).register_forward_hook(lambda *given: read.append(_hidden(given[2])))
    try:
        for batch in batches:
            model(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                use_cache=False,
            )
            of_answer = (batch["labels"] != IGNORE)[..., None].to(model.device)
            means.append(((read.pop().float() * of_answer).sum(1) / of_answer.sum(1)).cpu())
    finally:
        hook.remove()
    return torch.cat(means)


def change_outputs(model: nn.Module, number: int | None, directions: Tensor, change: Change) -> None:
    """From now on the outputs h of the layer are `change(h, directions)` in training mode, as they are in eval mode.

    `directions` go where the layer goes, and are in no state dict.
    """
    layer = layer_at(model, number)
    layer.register_buffer("directions", directions, persistent=False)

    def hook(module: Any, _: Any, output: Any) -> Any:
        if not module.training or hasattr(module, RECOMPUTED):
            return output
        hidden = _hidden(output)
        return _with_hidden(output, change(hidden, module.directions.to(hidden.dtype)))

    layer.register_forward_hook(hook)


@contextmanager
def each_output(model: nn.Module, change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Inside, the outputs h (..., H) of each transformer layer are `change(number, h)`, with numbers from 0."""

    def hook(number: int) -> Callable[..., Any]:
        return lambda _, __, output: _with_hidden(output, change(number, _hidden(output)))

    inside = layers(text_part(model))
    handles = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(inside)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def layer_outputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the outputs (..., H) of all transformer layers are added to the list, in the order in which they run."""
    outputs: list[Tensor] = []

    def read(_: int, hidden: Tensor) -> Tensor:
        outputs.append(hidden)
        return hidden

    with each_output(model, read):
        yield outputs


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def _hidden(output: Any) -> Tensor:
    hidden: Tensor = output if isinstance(output, Tensor) else output[0]
    return hidden
