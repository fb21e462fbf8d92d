"""The run folder: its lock, its record, its predictions. Files are written whole or not at all."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from lightning_utilities.core.rank_zero import rank_zero_only

from secvec.errors import ArtifactError, SecVecError
from secvec.runs.files import read_lines, write_atomic, write_lines
from secvec.runs.processes import main_process
from secvec.runs.record import FILE, Record, provenance

ANSWERS = "answers"
"""Folder of the responses of an evaluation that has not ended, below the run folder."""

CONFIG = "config.yaml"
"""The config of the run, which --config-dir runs again, below the run folder."""


class RunFolder:
    """One folder for one run. Only rank 0 writes; two processes cannot run in the same folder at once.

    `config` is the text of config.yaml, written when the run starts; empty: no such file.
    """

    def __init__(self, path: Path, record: Record, config: str = ""):
        """Raises ArtifactError where `path` holds another run, DataError where its record cannot be read.

        What `path` holds of the same run, as its `key` tells, is taken over.
        """
        self.path, self.record, self.config = path, record, config
        record.run = path.name
        if (path / FILE).is_file():
            before = Record.read(path / FILE)
            if before.key == record.key:
                for name in ("stages", "data", "wall_seconds", "checkpoint_bytes", "processes", "metrics", "ledger"):
                    setattr(record, name, getattr(before, name))
            elif before.key:
                raise ArtifactError(
                    f"{path} holds another run (key {before.key}, this one is {record.key}): choose another run_dir"
                )

    def finished(self, stages: Sequence[str]) -> bool:
        """Whether all of `stages` ended well here before."""
        return set(stages) <= set(self.record.stages)

    def complete(self) -> None:
        """Sets the status to `completed`, where a process was killed between the run's last stage and its end."""
        before = Record.read(self.path / FILE)
        if before.status != "completed" and main_process():
            before.status, before.error = "completed", None
            before.write(self.path / FILE)
        self.record = before

    def forget(self, stages: Sequence[str], artifacts: Sequence[str]) -> None:
        """Drops what `stages` left, `artifacts` too, so that they run again."""
        self.record.stages = [stage for stage in self.record.stages if stage not in stages]
        for name in (*artifacts, "checkpoints", ANSWERS):
            shutil.rmtree(self.path / name, ignore_errors=True)
        self.save()

    def drop_checkpoints(self, training: str) -> None:
        """Drops the checkpoints of a training whose result is where other runs find it: it is never made again."""
        if main_process():
            shutil.rmtree(self.path / "checkpoints" / training, ignore_errors=True)
            with suppress(OSError):
                (self.path / "checkpoints").rmdir()  # another training's may be there

    def drop_metrics(self, prefixes: Sequence[str]) -> None:
        """Drops the metrics that begin with one of `prefixes`: another evaluation need not measure all of them."""
        metrics = self.record.metrics
        self.record.metrics = {name: metrics[name] for name in metrics if not name.startswith(tuple(prefixes))}

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
            if self.config:
                write_atomic(self.path / CONFIG, self.config)
            self.record.created = datetime.now(UTC).isoformat(timespec="seconds")
            for name, value in provenance().items():
                setattr(self.record, name, value)
            yield
            self.record.status = "completed"
            self.save()
            shutil.rmtree(self.path / ANSWERS, ignore_errors=True)  # they are in predictions.jsonl
        except BaseException as error:
            mistake = isinstance(error, SecVecError) and error.exit_code == 2
            self.record.status = "failed"
            self.record.error = str(error) if mistake else f"{type(error).__name__}: {error}"
            if self.record.stages or not mistake:
                self.save()
            else:
                for name in ("train.log", CONFIG):  # a mistake found before anything was made
                    (self.path / name).unlink(missing_ok=True)
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
        self.record.write(self.path / FILE)

    @rank_zero_only
    def add_predictions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes predictions.jsonl: `rows` in the place of earlier ones of the same phases."""
        path, phases = self.path / "predictions.jsonl", {row["phase"] for row in rows}
        kept = [row for row in read_lines(path) if row["phase"] not in phases]
        write_lines(path, [*kept, *rows])
