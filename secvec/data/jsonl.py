"""Users' own files: one JSON object a line, `prompt`/`response` or chat `messages`."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any, Literal

from pydantic import FilePath

from secvec.data.example import Example, Kind, Split
from secvec.errors import DataError
from secvec.settings import Settings

ROLES = ("system", "user", "assistant")


class JsonlFiles(Settings):
    """A file per split; a split without a file cannot be asked for."""

    align: FilePath | None = None
    vector: FilePath | None = None
    validation: FilePath | None = None
    finetune: FilePath | None = None
    test: FilePath | None = None

    def read(self, split: Split, n: int, seed: int, kind: Kind, owner: str) -> list[Example]:
        """`n` rows of the split's file in seeded order (a smaller n is a prefix). Raises DataError.

        Without a `validation` file, every fifth row of the `vector` file is held out for it.
        """
        if n == 0:
            return []
        path, keep = getattr(self, split), lambda number: True
        if self.validation is None and split in ("vector", "validation"):
            path, keep = self.vector, lambda number: (number % 5 == 4) == (split == "validation")
        if path is None:
            raise DataError(f"{owner} has no file for split {split!r}: set {owner}.{split}=FILE.jsonl")
        rows = [row for number, row in enumerate(read_jsonl(path, kind)) if keep(number)]
        if len(rows) < n:
            held = ", every fifth row being held out for validation" if keep(4) != keep(3) else ""
            raise DataError(f"{path} has {len(rows)} rows for split {split!r}{held}, but {n} are asked for")
        Random(f"{owner}/{split}/{seed}").shuffle(rows)
        return rows[:n]


class JsonlStream(JsonlFiles):
    """Benign data out of files: `task` is what is to be learned, `ordinary` what must stay as it is."""

    kind: Literal["task", "ordinary"]

    def examples(self, split: Split, n: int, seed: int) -> list[Example]:
        """The first `n` examples of `split` under `seed`."""
        return self.read(split, n, seed, self.kind, f"data.benign[{self.kind}]")


def read_jsonl(path: Path, kind: Kind) -> list[Example]:
    """All rows of a file; raises DataError naming the file and the line of the first bad one."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_example(line, kind, f"{path}:{number}"))
    if not rows:
        raise DataError(f"{path}: the file is empty")
    return rows


def _example(line: bytes, kind: Kind, where: str) -> Example:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start})") from None
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
    """Chat turns: an optional system turn, then user and assistant in turn, ending with the assistant."""
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
