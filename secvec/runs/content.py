"""What files and folders hold, as SHA-256, wherever they lie and whenever they were written. Imports no torch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from secvec.runs.files import files_in, write_atomic

OF_MODELS = (
    *("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "**/*.py"),
    "additional_chat_templates/*.jinja",
    "adapter_model.bin",  # PEFT reads it where there is no other
)
"""Files of a model or an adapter that shape what it says: weights, configs, tokenizer, templates, its own code."""
DATASET_CONFIG = ".huggingface.yaml"
"""What `datasets` reads beside, or in the place of, the header of README.md."""
OF_ROWS = ("file", "align", "vector", "validation", "finetune", "test")
"""Settings of data that name rows, or the rows of a split."""
NAMES_FOLDERS = ("path", "folder", "model", "dataset", *OF_ROWS)
"""Parts of the names of settings that may name a folder. Elsewhere a word that is also a folder's name is a word."""
LARGE = 64 * 2**20
"""Bytes from which on a digest is kept: a smaller file is read again, and then no change can be missed."""
SETTLED = 2e9
"""Nanoseconds since its last change after which a file's times tell a further change."""

_digests: dict[str, str] = {}


def file_digest(file: Path, keep: Path | None = None) -> str:
    """SHA-256 of a file. That of a large one is kept in this process and in the folder `keep`, until the file changes.

    A file is known by its path, size, inode and times; ctime is one that no program can set back.
    """
    stat = file.stat()
    settled = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED
    if stat.st_size < LARGE or not settled:
        return _read(file)
    known = [str(file.resolve()), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]
    mark = hashlib.sha256(repr(known).encode()).hexdigest()
    kept = keep / mark[:32] if keep else None
    if mark not in _digests:
        text = ""
        with suppress(OSError):  # none is kept yet
            text = kept.read_text() if kept else ""
        _digests[mark] = text or _read(file)
    with suppress(OSError):  # a cache that may only be read, or is full: the digest is that of the file all the same
        if kept and not kept.is_file():
            write_atomic(kept, _digests[mark])
    return _digests[mark]


def folder_digest(folder: Path, keep: Path | None = None, without: Sequence[str] = ()) -> str:
    """SHA-256 of the names and contents of the files that count: in a model's folder OF_MODELS, elsewhere all.

    Those named in `without`, hidden files and Markdown do not count. In a dataset, DATASET_CONFIG and the header of the
    card do: they may name the files of a split.
    """
    model = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    of_model = {file for pattern in OF_MODELS for file in folder.glob(pattern)}
    files = of_model if model else {*files_in(folder), folder / DATASET_CONFIG}
    names = {file.relative_to(folder).as_posix(): file for file in files if file.is_file() and file.suffix != ".md"}
    names = {name: file for name, file in names.items() if name not in without}
    counts = {name for name in names if "/." not in f"/{name}" or name == DATASET_CONFIG}
    seen = {name: file_digest(file, keep) for name, file in names.items() if name in counts}
    card = folder / "README.md"
    if not model and card.is_file():
        from huggingface_hub.repocard import REGEX_YAML_BLOCK  # by which `datasets` finds the header

        if header := REGEX_YAML_BLOCK.search(card.read_text(encoding="utf-8-sig", errors="replace")):
            seen[card.name] = hashlib.sha256(header[2].encode()).hexdigest()
    return hashlib.sha256(repr(sorted(seen.items())).encode()).hexdigest()


def by_content(settings: Any, keep: Path | None = None, name: str = "") -> Any:
    """`settings` with what they name, files and folders, in the place of the paths; `name` is that of the setting."""
    if isinstance(settings, Mapping):
        return {key: by_content(value, keep, str(key)) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [by_content(value, keep, name) for value in settings]
    if isinstance(settings, str | Path) and settings and len(str(settings)) < 4096 and "\0" not in str(settings):
        path = Path(settings).expanduser() if str(settings).startswith("~/") else Path(settings)
        try:
            is_file, is_folder = path.is_file(), path.is_dir()
        except OSError:  # a text that no file can be called by
            return settings
        if is_file:
            return file_digest(path, keep)
        if is_folder and any(word in name for word in NAMES_FOLDERS):
            return folder_digest(path, keep)
    return settings


def mapped(node: Any, change: Callable[[Any], Any]) -> Any:
    """`node` with `change(leaf)` in the place of each leaf of its mappings and lists."""
    if isinstance(node, Mapping):
        return {key: mapped(value, change) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [mapped(value, change) for value in node]
    return change(node)


def _read(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
