"""Next-token logits only where they are needed: the output head is a large part of a small model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def logits_at(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, at: Tensor) -> Tensor:
    """The logits after the tokens that `at` marks, row by row: (B, T) ids, mask and bools -> (N, V), N = at.sum().

    The hidden states of all tokens are computed, the output head is applied to N of them. Whatever the model does with
    its logits after the head (scaling, a soft cap) is done by the model itself.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, given: (given[0][at], *given[1:]))
    try:
        output: Any = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        hook.remove()
    logits: Tensor = output.logits
    return logits if logits.dim() == 2 else logits[at]  # a model that computes its logits in another way
