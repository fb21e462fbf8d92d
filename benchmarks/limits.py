"""The physical limit of a training step: the time of its matrix products alone, at the shapes that the model has."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

REPEATS = 5
Shape = tuple[int, int]
"""Rows and columns of a weight: (out, in)."""


def linear_layers(model: Path) -> tuple[Counter[Shape], Shape]:
    """The weights of a model's linear layers with their numbers, and its output head's. Loads no weights."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head = made.get_output_embeddings()
    layers = [layer for layer in made.modules() if isinstance(layer, nn.Linear) and layer is not head]
    return Counter((layer.out_features, layer.in_features) for layer in layers), tuple(head.weight.shape)


def product_seconds(model: Path, tokens: int, labels: int, full: bool, device: str, precision: str) -> float:
    """Seconds of the matrix products of one step, each measured alone and repeated.

    Every linear layer multiplies `tokens` rows forward and, for the gradient of its input, backward; with `full` once
    more for the gradient of its weight. The output head does it for `labels` rows. What attention multiplies is left
    out: on rows of a few hundred tokens it is some percent.
    """
    layers, head = linear_layers(model)
    given = [(shape, tokens, count) for shape, count in layers.items()] + [(head, labels, 1)]
    return sum(count * _seconds(shape, rows, full, device, precision) for shape, rows, count in given)


def _seconds(shape: Shape, rows: int, full: bool, device: str, precision: str) -> float:
    import torch

    kind = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}.get(precision, torch.float32)
    weight = torch.randn(shape, device=device, dtype=kind)
    inputs, gradient = (torch.randn(rows, size, device=device, dtype=kind) for size in reversed(shape))
    products: list[Callable[[], object]] = [lambda: inputs @ weight.T, lambda: gradient @ weight]
    products += [lambda: gradient.T @ inputs] if full else []

    def once(product: Callable[[], object]) -> float:
        start = time.perf_counter()
        product()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return sum(statistics.median([once(product) for _ in range(REPEATS + 1)][1:]) for product in products)
