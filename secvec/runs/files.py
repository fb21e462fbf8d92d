"""Files written whole or not at all. Imports no torch."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and vanishes when it does not.

    Raises FileNotFoundError when the block made nothing; what was at `path` then stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    made = holder / path.name
    try:
        yield made
        if made.exists() and path.exists() and (made.is_dir() or path.is_dir()):
            os.replace(path, holder / "before")
        os.replace(made, path)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file (text as UTF-8) so that a reader never meets half of it."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.encode("utf-8", "replace") if isinstance(content, str) else content)


def read_lines(path: Path) -> list[Any]:
    """The rows of a file of JSON lines; none where there is no file."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.split("\n") if line]  # splitlines would split texts too


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    """Writes `rows` as JSON lines, whole or not at all."""
    write_atomic(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows))
