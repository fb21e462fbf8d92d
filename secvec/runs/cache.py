"""Artifacts that are made once and found again by their path."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from filelock import FileLock

from secvec.errors import ConfigError
from secvec.runs.files import atomic_path, write_atomic
from secvec.runs.processes import main_process

MARK, SIGNATURE = "CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n"
"""The mark of a cache, which backup programs know too (https://bford.info/cachedir)."""


def prepare_cache(folder: Path) -> None:
    """Makes the folder of a cache, with the mark by which it is known. Raises ConfigError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"paths.cache={folder} cannot be a folder ({error.strerror}): give another one") from None
    with suppress(OSError):  # a cache that may only be read
        if not (folder / MARK).is_file():
            write_atomic(folder / MARK, SIGNATURE)


def cached(path: Path, build: Callable[[Path], None], usable: Callable[[Path], bool] = Path.exists) -> Path:
    """`path`, a file or a folder, built by `build(temporary path)` when it is not `usable` yet; others wait for it.

    Of the processes of a run the first one builds it: the others do not save.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while not main_process() and not usable(path):
        time.sleep(0.1)
    if usable(path) and not os.access(path.parent, os.W_OK):
        return path  # of a cache that may only be read
    with FileLock(f"{path}.lock"):
        if usable(path):
            with suppress(OSError):  # another user's, in a cache that several share
                os.utime(path)  # used: `python -m secvec.runs --days N` spares it
        else:
            with atomic_path(path) as temporary:
                build(temporary)
    return path


def built_once(path: Path, build: Callable[[Path], None]) -> Path:
    """Like `cached`, for what all processes build together; the first one decides whether it is needed.

    `build` is called by every process with the same temporary folder; the first one moves it into its place.
    """
    import torch.distributed as dist  # slow to import, and the report needs none of it

    if not dist.is_initialized():
        return cached(path, build)
    box: list[str | None] = [None]
    with ExitStack() as stack:
        if main_process():
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{path}.lock"))
            box = [None if path.exists() else str(stack.enter_context(atomic_path(path)))]
        dist.broadcast_object_list(box)
        if box[0] is not None:
            build(Path(box[0]))
            dist.barrier()  # nobody reads there any more
    dist.barrier()  # it is in its place
    return path


def copy_folder(source: Path, target: Path) -> None:
    """A folder of the cache, or of another run, into the run folder."""
    if main_process() and source != target:
        with atomic_path(target) as out:
            shutil.copytree(source, out)
