"""The run folder: its lock, its record with provenance, its predictions. Nothing half-written is left."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from secvec.errors import ArtifactError, SecVecError
from secvec.runs.cache import main_process
from secvec.runs.files import write_atomic

ANSWERS = "answers"
"""What an evaluation that has not ended has been told, below the run folder."""
REFITTED = "vector-refitted"
"""The last cycle's vector, where each cycle trains its own, below the run folder."""

PACKAGES = ("secvec", "torch", "lightning", "hydra-core", "transformers", "peft", "tokenizers", "safetensors")


def provenance() -> dict[str, Any]:
    """Versions of the packages that shape results, and the commit of the source, if it is a git checkout."""

    def git(*arguments: str) -> str | None:
        here = Path(__file__).parent
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    return {
        "versions": {name: version(name) for name in PACKAGES},
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


class RunFolder:
    """One folder for one run. Only rank 0 writes; two processes cannot run in the same folder at once."""

    def __init__(self, path: Path, key: str, identity: Mapping[str, Any]):
        self.path, self.key = path, key
        self.record: dict[str, Any] = {"schema": 1, "run": path.name, "key": key, **identity}
        self.record |= {"status": "running", "stages": [], "data": {"sha256": {}, "counts": {}}}
        self.record |= {"wall_seconds": {}, "metrics": {}}
        before = self._read()
        if before and before.get("key") == key:
            kept = ("stages", "data", "wall_seconds", "metrics", "ledger")
            self.record |= {name: before[name] for name in kept if name in before}
        elif before and "key" in before:
            raise ArtifactError(
                f"{path} holds another run (key {before.get('key')}, this one is {key}): choose another run_dir"
            )

    def finished(self, stages: Sequence[str]) -> bool:
        """Whether all of `stages` ended well here before."""
        return set(stages) <= set(self.record["stages"])

    def forget(self, stages: Sequence[str]) -> None:
        """Drops what `stages` left, so that they run again."""
        self.record["stages"] = [stage for stage in self.record["stages"] if stage not in stages]
        for stage, names in {"vector": ["vector"], "finetune": ["backbone", "task", REFITTED]}.items():
            for name in names if stage in stages else []:
                shutil.rmtree(self.path / name, ignore_errors=True)
        for unfinished in ("checkpoints", ANSWERS):
            shutil.rmtree(self.path / unfinished, ignore_errors=True)
        self.save()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Holds the lock, writes the record's end: `completed`, or `failed` with the error."""
        if not main_process():
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ArtifactError(f"another process is running in {self.path}: wait for it, or change run_dir") from None
        log_file = logging.FileHandler(self.path / "train.log", encoding="utf-8")
        log_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger().addHandler(log_file)
        for leftover in self.path.glob(".*.*/"):  # of a process that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            self.record |= {"created": datetime.now(UTC).isoformat(timespec="seconds"), **provenance()}
            yield
            self.record["status"] = "completed"
            self.save()
            shutil.rmtree(self.path / ANSWERS, ignore_errors=True)  # they are in predictions.jsonl
        except BaseException as error:
            mistake = isinstance(error, SecVecError) and error.exit_code == 2
            self.record |= {"status": "failed", "error": str(error) if mistake else f"{type(error).__name__}: {error}"}
            if self.record["stages"] or not mistake:
                self.save()
            else:
                (self.path / "train.log").unlink(missing_ok=True)  # a mistake found before anything was made
            raise
        finally:
            logging.getLogger().removeHandler(log_file)
            log_file.close()
            (self.path / ".lock").unlink(missing_ok=True)
            lock.release()
            if not any(self.path.iterdir()):
                self.path.rmdir()

    @rank_zero_only
    def save(self) -> None:
        """Writes record.json."""
        write_atomic(self.path / "record.json", json.dumps(self.record, indent=1, allow_nan=True, default=str) + "\n")

    @rank_zero_only
    def add_predictions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes predictions.jsonl: `rows` in the place of earlier ones of the same phases."""
        path, phases = self.path / "predictions.jsonl", {row["phase"] for row in rows}
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        kept = [line for line in lines if line and json.loads(line)["phase"] not in phases]
        write_atomic(path, "".join(f"{line}\n" for line in [*kept, *(json.dumps(r, ensure_ascii=False) for r in rows)]))

    def _read(self) -> dict[str, Any] | None:
        path = self.path / "record.json"
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        except json.JSONDecodeError as error:
            raise ArtifactError(f"{path}:{error.lineno}: not a record ({error.msg}); move the folder away") from None
