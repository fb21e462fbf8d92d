"""Next-token logits without waste: no padding, and the output head only where its logits are needed.

Ids and masks stay on the host. What a step computes is decided there, so nothing waits for the device; it gets the
tokens, and the places where logits are needed, as numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secvec.models.packing import pack, packs


def logits_at(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, at: Tensor) -> Tensor:
    """The logits after the tokens that `at` marks, row by row: (B, T) ids, mask and bools -> (N, V), N = at.sum().

    Rows are padded on the right. The output head is applied to N hidden states. Whatever the model does with its
    logits after the head (scaling, a soft cap) is done by the model itself.
    """
    device = next(model.parameters()).device
    if packs(model, attention_mask):
        given, at = pack(input_ids, attention_mask, device), at[attention_mask.bool()]
    else:
        both = {"input_ids": input_ids, "attention_mask": attention_mask}
        given = {name: tensor.to(device, non_blocking=True) for name, tensor in both.items()}
    places = places_of(at, device)
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].flatten(0, 1)[places], *inputs[1:]))
    try:
        output: Any = model(**given, use_cache=False)
    finally:
        hook.remove()
    logits: Tensor = output.logits
    # a model that computes its logits in another way gives them for all tokens
    return logits if logits.dim() == 2 else logits.flatten(0, 1)[places]


def places_of(at: Tensor, device: torch.device) -> Tensor:
    """The places that the bools `at` mark, counted row by row, as an index on `device`: int64, (at.sum(),).

    An index by bools on a GPU would wait for it: the size of the result is not known before.
    """
    return at.flatten().nonzero().squeeze(1).to(device, non_blocking=True)
