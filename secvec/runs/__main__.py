"""Command line: `python -m secvec.runs [--cache DIR] [--kind KIND] [--days N] [--remove]`."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from secvec.runs.cache import MARK

KINDS = {
    "models": "aligned starting models",
    "vectors": "security vectors",
    "preparations": "what a defense has trained before the fine-tune",
    "cycles": "backbones between two fine-tunes",
    "finetuned": "paths of finished fine-tunes",
    "answers": "answers and verdicts of starting models",
    "own_answers": "answers of starting models, as training rows",
    "activations": "mean activations of starting models",
    "tokens": "token ids of large data",
    "digests": "checksums of files that have not changed since",
}
"""The folders of the cache. The judgements beside them (`judgements.sqlite`) stay: a service may have cost money."""


@dataclass(frozen=True)
class Entry:
    """One thing that runs share."""

    path: Path
    size: int
    days: float
    """Since it was made or used."""


def entries(cache: Path, kinds: Iterable[str], days: float) -> dict[str, list[Entry]]:
    """What the cache holds of `kinds` that was not used for `days`, by kind."""
    found: dict[str, list[Entry]] = {}
    for kind in kinds:
        paths = sorted((cache / kind).iterdir()) if (cache / kind).is_dir() else []
        for path in paths:
            if path.name.endswith(".lock"):
                continue
            files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
            age = (time.time() - path.stat().st_mtime) / 86400
            if age >= days:
                found.setdefault(kind, []).append(Entry(path, sum(file.stat().st_size for file in files), age))
    return found


def remove(entry: Entry) -> bool:
    """Removes it, unless a run is making it."""
    lock = FileLock(_lock_of(entry.path))
    try:
        with lock.acquire(timeout=0):
            shutil.rmtree(entry.path) if entry.path.is_dir() else entry.path.unlink()
    except Timeout:
        return False
    Path(lock.lock_file).unlink(missing_ok=True)
    return True


def _lock_of(path: Path) -> Path:
    """The lock of an entry, also of one that is being made: `.KEY.xxxx` (`atomic_path`), `KEY.part` (an alignment)."""
    name = path.name[1:].rpartition(".")[0] if path.name.startswith(".") else path.name
    return path.with_name(f"{name.removesuffix('.part')}.lock")


def main(argv: Sequence[str] | None = None) -> int:
    """Lists the cache, or removes of it what is asked for; 0, or 2 when there is no such cache."""
    parser = argparse.ArgumentParser(
        prog="python -m secvec.runs",
        description="What the runs share below outputs/cache. Whatever is removed is made again when a run needs it.",
    )
    parser.add_argument("--cache", type=Path, default=Path("outputs/cache"), help="default: %(default)s")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind; may be given several times")
    parser.add_argument("--days", type=float, default=0.0, help="only what was not used for so many days")
    parser.add_argument("--remove", action="store_true", help="remove them; stop all runs first")
    given = parser.parse_args(argv)
    if not (given.cache / MARK).is_file():
        print(
            f"error: {given.cache} is no cache of runs (it holds no {MARK}): give the folder paths.cache with --cache "
            "DIR; a cache of an older version gets the mark by the next run",
            file=sys.stderr,
        )
        return 2
    if not given.days >= 0:
        print(f"error: --days {given.days:g} must be 0 or more", file=sys.stderr)
        return 2
    found = entries(given.cache, given.kind or KINDS, given.days)
    print(f"{'kind':<12} {'entries':>8} {'size':>10} {'last used':>14}")
    for kind, some in found.items():
        size, newest = sum(entry.size for entry in some), min(entry.days for entry in some)
        print(f"{kind:<12} {len(some):>8} {size / 1e6:>7.1f} MB {newest:>6.1f} days ago  {KINDS[kind]}")
    if given.remove:
        gone = [entry for some in found.values() for entry in some if remove(entry)]
        kept = sum(map(len, found.values())) - len(gone)
        print(f"removed {len(gone)} entries, {sum(entry.size for entry in gone) / 1e6:.1f} MB", end="")
        print(f"; {kept} are in use" if kept else "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
