"""Tokens of large data, kept on disk by content and read from there page by page: memory stays flat."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from secvec.data.batch import Encoded
from secvec.data.draw import data_hash
from secvec.data.encode import RULES, encode
from secvec.data.example import Example
from secvec.runs.cache import cached
from secvec.runs.keys import content_key

LARGE = 5_000
"""Rows from which on tokens are kept: fewer are tokenised again in less time than a file is worth."""
CHUNK = 2_000


def encoded(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, context: int, cache: Path
) -> list[Encoded]:
    """Like `encode`; large data once only, whatever run asks, with `input_ids` that lie in a memory-mapped file."""
    if len(examples) < LARGE:
        return encode(examples, tokenizer, context)
    embeddings = getattr(tokenizer, "num_embeddings", None)  # an id beyond them is refused
    key = content_key([RULES, data_hash(examples), _identity(tokenizer), context, embeddings])
    folder = cached(cache / "tokens" / key, lambda out: _write(examples, tokenizer, context, out))
    tokens: Any = np.asarray(
        np.load(folder / "tokens.npy", mmap_mode="r")
    )  # a slice of a memmap takes ten times as long
    ends, prompts = np.load(folder / "ends.npy").tolist(), np.load(folder / "prompts.npy").tolist()
    return [Encoded(tokens[a:b], p) for a, b, p in zip([0, *ends], ends, prompts, strict=False)]


def _write(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, context: int, out: Path) -> None:
    out.mkdir()
    lengths: list[int] = []
    prompts: list[int] = []
    with (out / "tokens.bin").open("wb") as stream:
        for start in range(0, len(examples), CHUNK):
            for row in encode(examples[start : start + CHUNK], tokenizer, context):
                stream.write(np.asarray(row.input_ids, dtype=np.int32).tobytes())
                lengths.append(len(row.input_ids))
                prompts.append(row.num_prompt)
    flat = np.memmap(out / "tokens.bin", dtype=np.int32, mode="r")
    np.save(out / "tokens.npy", flat)
    np.save(out / "ends.npy", np.asarray(list(accumulate(lengths))))
    np.save(out / "prompts.npy", np.asarray(prompts))
    (out / "tokens.bin").unlink()


def _identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """What makes two tokenizers write the same tokens: vocabulary, rules, special tokens, template."""
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else str(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{rules}\n{tokenizer.chat_template}\n{tokenizer.special_tokens_map}".encode()).hexdigest()
