"""Tokens kept on disk are the tokens that encode gives, written once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from secvec.data import tokens
from secvec.data.batch import collate
from secvec.data.embedded import Ordinary, Skill
from secvec.data.encode import encode
from secvec.models.tiny import build_tiny

EXAMPLES = [*Ordinary().examples("align", 60, 0), *Skill().examples("align", 20, 0)]
TOKENIZER = build_tiny([text for e in EXAMPLES for text in (e.prompt, e.response)], 0)[1]


def test_large_data_is_tokenised_once_and_read_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tokens.encoded(EXAMPLES, TOKENIZER, 512, tmp_path)
    assert not (tmp_path / "tokens").exists()  # few rows: no file
    monkeypatch.setattr(tokens, "LARGE", 10)
    monkeypatch.setattr(tokens, "CHUNK", 7)  # several chunks
    kept = tokens.encoded(EXAMPLES, TOKENIZER, 512, tmp_path)
    assert [(list(row.input_ids), row.num_prompt) for row in kept] == [(row.input_ids, row.num_prompt) for row in plain]
    assert isinstance(kept[0].input_ids.base.base, np.memmap)  # type: ignore[attr-defined]
    batches = (collate([(row, False) for row in rows[:5]]) for rows in (kept, plain))
    first, second = ({name: tensor.tolist() for name, tensor in batch.items()} for batch in batches)
    assert first == second
    monkeypatch.setattr(tokens, "encode", lambda *_: pytest.fail("tokenised again"))
    assert len(tokens.encoded(EXAMPLES, TOKENIZER, 512, tmp_path)) == len(EXAMPLES)


def test_other_data_template_or_context_are_other_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "LARGE", 10)
    tokens.encoded(EXAMPLES, TOKENIZER, 512, tmp_path)
    tokens.encoded(EXAMPLES[1:], TOKENIZER, 512, tmp_path)
    tokens.encoded(EXAMPLES, TOKENIZER, 256, tmp_path)
    monkeypatch.setattr(TOKENIZER, "num_embeddings", len(TOKENIZER), raising=False)  # checked while they are written
    tokens.encoded(EXAMPLES, TOKENIZER, 512, tmp_path)
    monkeypatch.setattr(TOKENIZER, "chat_template", None)
    found = tokens.encoded(EXAMPLES, TOKENIZER, 512, tmp_path)
    assert len([path for path in (tmp_path / "tokens").iterdir() if path.is_dir()]) == 5
    assert list(found[0].input_ids) == encode(EXAMPLES[:1], TOKENIZER, 512)[0].input_ids
