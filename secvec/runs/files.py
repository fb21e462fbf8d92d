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


def files_in(folder: Path) -> list[Path]:
    """The files of a folder and of those in it, also of those that are linked into it.

    Hidden ones are left out: checkpoints of notebooks, and what some systems keep beside a file.
    """
    found, seen = list[Path](), set[Path]()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := Path(place).resolve()) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(file for file in found if file.is_file())
