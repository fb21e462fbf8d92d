"""Next-token logits without waste: no padding, and the output head only where its logits are needed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from secvec.models.packing import pack, packs


def logits_at(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, at: Tensor) -> Tensor:
    """The logits after the tokens that `at` marks, row by row: (B, T) ids, mask and bools -> (N, V), N = at.sum().

    Rows are padded on the right. The output head is applied to N hidden states. Whatever the model does with its
    logits after the head (scaling, a soft cap) is done by the model itself.
    """
    given = {"input_ids": input_ids, "attention_mask": attention_mask}
    if packs(model, attention_mask):
        given, at = pack(input_ids, attention_mask), at[attention_mask.bool()][None]
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][at], *inputs[1:]))
    try:
        output: Any = model(**given, use_cache=False)
    finally:
        hook.remove()
    logits: Tensor = output.logits
    return logits if logits.dim() == 2 else logits[at]  # a model that computes its logits in another way
