"""A weight as it is multiplied, wherever and however it is held: in memory, on disk (outlined), in 4 bits.

The only file that knows how bitsandbytes holds a weight (`Params4bit`: packed numbers, and their `quant_state`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def keep_packing(model: nn.Module) -> None:
    """From now on the weights of `model` stay as they are.

    On a CPU with AVX512-BF16 bitsandbytes would pack them anew when they first answer, and then compute in bfloat16: a
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
