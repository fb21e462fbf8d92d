"""A batch without padding: its rows one behind another in one sequence, each attending to itself alone.

All that acts on single tokens (linear layers, norms, the output head) then sees real tokens only. transformers passes
an attention mask with four dimensions on to the attention as it is. Ours is no mask: it holds the lengths of the rows.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from secvec.models.modes import in_eval
from secvec.models.outline import weights_at_hand

log = logging.getLogger(__name__)

PACKED = "sdpa_packed"
LIMITS = ("sliding_window", "attention_chunk_size")
"""Config entries by which a token does not see all tokens before it."""


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA; on a packed batch, row by row: (1, heads, N, size) -> (1, N, heads, size)."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    lengths = attention_mask.flatten().tolist()
    rows = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    kwargs["is_causal"] = True
    return torch.cat([sdpa_attention_forward(module, *row, None, **kwargs)[0] for row in rows], 1), None


AttentionInterface.register(PACKED, _attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


SECOND = slice(7, None)
"""The tokens of the second row of the trial: the first one has seven."""


def rounding(dtype: torch.dtype) -> float:
    """How far two computations of the same logits may lie apart, as a share of the largest."""
    return 10 * float(torch.finfo(dtype).eps) ** 0.75


def enable_packing(model: PreTrainedModel) -> bool:
    """Makes `model` take packed batches, if its logits on one are those on the padded batch; else it stays as it is.

    So a model whose rows would see one another (state-space layers, biases of the attention) keeps its padding.
    """
    if model.config._attn_implementation != "sdpa":
        return False
    embeddings: Any = model.get_input_embeddings()
    ids = torch.arange(3, 25, device=model.device).reshape(2, 11) % len(embeddings.weight)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    with torch.no_grad(), in_eval(model), weights_at_hand(model):
        padded = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        model.set_attn_implementation(PACKED)
        try:
            packed = model(**pack(ids, mask, model.device), use_cache=False).logits[0]
            others = torch.cat([ids[:1].flip(1), ids[1:]])  # beside another row
            beside = model(**pack(others, mask, model.device), use_cache=False).logits[0]
            far, seen = (float((packed - one).abs()[of].max()) for one, of in ((padded, slice(None)), (beside, SECOND)))
            largest = float(padded.abs().max())
            same = far <= rounding(padded.dtype) * largest and seen <= rounding(torch.float32) * largest
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError) as error:
            log.debug("packing: %s", error)
            same = False
    if not same:
        model.set_attn_implementation("sdpa")
        log.info("%s takes padded batches: its rows cannot stand in one sequence", type(model).__name__)
    return same


def packs(model: Any, attention_mask: Tensor) -> bool:
    """Whether `model` takes the rows of `attention_mask` (B, T) packed."""
    config = model.config.get_text_config()
    if config._attn_implementation != PACKED:
        return False
    limits = [limit for name in LIMITS if (limit := getattr(config, name, None))]
    return attention_mask.shape[1] <= min(limits, default=attention_mask.shape[1])


def pack(input_ids: Tensor, attention_mask: Tensor, device: torch.device) -> dict[str, Tensor]:
    """The arguments of a model on `device` for the tokens that are not padding: (B, T) -> (1, N), row by row.

    The lengths of the rows stay on the host, which reads them in every layer.
    """
    here = attention_mask.bool()
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    lengths = here.sum(1, dtype=torch.int32).cpu()
    return {
        "input_ids": input_ids[here][None].to(device, non_blocking=True),
        "position_ids": positions[here][None].to(device, non_blocking=True),
        "attention_mask": lengths.view(1, 1, 1, -1),
    }
