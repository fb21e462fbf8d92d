"""The plain values of a weight: one in memory, on disk (outlined) or in 4 bits.

The only file that knows how bitsandbytes holds a weight (`Params4bit`: packed numbers, and their `quant_state`).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

BYTES = 0.5 + (1 + 4 / 256) / 64
"""Of a weight in NF4 with double quantization: 4 bits; a byte for 64 of them; 4 bytes for 256 of those (2305.14314)."""


def mark_as_quantized(model: PreTrainedModel) -> None:
    """From now on the weights count as quantized that transformers would put in 4 bits. For a model without values.

    They are those of linear layers, except the output head.
    """
    kept = get_keys_to_not_convert(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and not any(f"{name}.".startswith(f"{one}.") for one in kept):
            weight: Any = module.weight
            weight.quant_state = SimpleNamespace(shape=weight.shape, dtype=weight.dtype)


def keep_packing(model: nn.Module) -> None:
    """From now on the weights of `model` stay as they are.

    On a CPU with AVX512-BF16 bitsandbytes would pack them again when they first answer, and then compute in bfloat16: a
    bare model would differ from itself.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def is_quantized(tensor: Any) -> bool:
    """Whether `tensor` is held in 4 bits."""
    return getattr(tensor, "quant_state", None) is not None


def shape_of(tensor: Any) -> torch.Size:
    """The shape of the weight; that of the packed numbers is another."""
    return torch.Size(tensor.quant_state.shape) if is_quantized(tensor) else tensor.shape


def plain_dtype(tensor: Any) -> torch.dtype:
    """The type that the weight is multiplied in."""
    dtype: torch.dtype = tensor.quant_state.dtype if is_quantized(tensor) else tensor.dtype
    return dtype


def plain_copy(tensor: Any) -> Tensor:
    """The values of the weight, which may be changed."""
    if is_quantized(tensor):
        from bitsandbytes.functional import dequantize_4bit  # an optional package

        return dequantize_4bit(tensor.data, tensor.quant_state)  # type: ignore[no-any-return]
    value: Tensor = tensor.read() if hasattr(tensor, "read") else tensor.detach().clone()
    return value
