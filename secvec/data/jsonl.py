"""The user's own files: one JSON object per line, with `prompt` and `response` or with chat `messages`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, Literal

from pydantic import FilePath

from secvec.data.example import Example, Kind, Split, Stream
from secvec.errors import DataError
from secvec.settings.schema import Settings

ROLES = ("system", "user", "assistant")


class JsonlFiles(Settings):
    """One file per split. A split without a file has no examples."""

    align: FilePath | None = None
    vector: FilePath | None = None
    finetune: FilePath | None = None
    test: FilePath | None = None

    def rows(self, split: Split, kind: Kind, owner: str) -> list[Example]:
        """All rows of the split's file, in order. Raises DataError."""
        path = getattr(self, split, None)
        if path is None:
            raise DataError(f"{owner} has no file for split {split!r}: set {owner}.{split}=FILE.jsonl")
        return read_jsonl(path, kind)


def sample(rows: Sequence[Example], n: int, seed: int, split: Split, file: Path, note: str = "") -> list[Example]:
    """`n` of `rows` in seeded order; a smaller `n` gives a prefix. Raises DataError if there are fewer."""
    if len(rows) < n:
        raise DataError(
            f"{file} has {len(rows)} rows for split {split!r}{note}, but the run needs {n}: lower the number"
        )
    return Random(f"{split}/{seed}").sample(list(rows), len(rows))[:n]


class JsonlStream(JsonlFiles, Stream):
    """Benign data from files: a `task` is to be learned, `ordinary` data must stay as it is."""

    kind: Literal["task", "ordinary"]

    def examples(self, split: Split, n: int, seed: int) -> list[Example]:
        """The first `n` examples of `split` under `seed`."""
        if n == 0:
            return []
        rows = self.rows(split, self.kind, "data.benign.NAME")
        return sample(rows, n, seed, split, getattr(self, split))


def read_jsonl(path: Path, kind: Kind) -> list[Example]:
    """All rows of a file. Raises DataError that names the file and the line of the first bad row."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_example(line, kind, f"{path}:{number}"))
    if not rows:
        raise DataError(f'{path}: the file is empty; a row is {{"prompt": ..., "response": ...}} on a line of its own')
    return rows


def _example(line: bytes, kind: Kind, where: str) -> Example:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: broken JSON at column {error.colno}: {error.msg}") from None
    if not isinstance(row, dict):
        raise DataError(
            f'{where}: a row is an object like {{"prompt": ..., "response": ...}}, got {type(row).__name__}'
        )
    if "messages" in row:
        messages = _messages(row["messages"], where)
    else:
        missing = [key for key in ("prompt", "response") if key not in row]
        if missing:
            raise DataError(
                f"{where}: missing {' and '.join(missing)} (there is: {', '.join(row) or 'nothing'}); "
                f"a row has prompt and response, or messages"
            )
        messages = [("user", row["prompt"]), ("assistant", row["response"])]
    for role, content in messages:
        if not isinstance(content, str) or not content.strip():
            raise DataError(
                f"{where}: the {'response' if role == 'assistant' else 'prompt'} must be text, got {content!r}"
            )
    return Example(tuple(messages[:-1]), messages[-1][1], kind, source=where)


def _messages(given: Any, where: str) -> list[tuple[str, Any]]:
    """Chat turns: an optional system turn, then user and assistant alternating, the assistant last."""
    if not isinstance(given, list) or not all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in given):
        raise DataError(f'{where}: messages must be a list of {{"role": ..., "content": ...}}')
    roles = [message["role"] for message in given]
    if unknown := [role for role in roles if role not in ROLES]:
        raise DataError(f"{where}: unknown role {unknown[0]!r}; allowed: {', '.join(ROLES)}")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(
            f"{where}: roles are {', '.join(roles) or 'none'}; expected user and assistant in turn (after an optional "
            f"system turn), ending with assistant"
        )
    return [(message["role"], message["content"]) for message in given]
