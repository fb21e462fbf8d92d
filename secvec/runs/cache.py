"""Artifacts that are made once and found again by their path; and which process makes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_only

from secvec.runs.files import atomic_path


def main_process() -> bool:
    """Whether this process is the one that writes (rank 0)."""
    return getattr(rank_zero_only, "rank", 0) == 0


def cached(path: Path, build: Callable[[Path], None]) -> Path:
    """`path`, a file or a folder, built by `build(temporary path)` when it is not there yet; others wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            with atomic_path(path) as temporary:
                build(temporary)
    return path
