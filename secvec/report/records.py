"""The runs to report: records, and beside them `metrics.csv` and `predictions.jsonl`, which may be absent."""

import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from secvec.errors import DataError
from secvec.metrics import Measurement
from secvec.runs.record import FILE, UNKNOWN, Record, read_json

RUN_FOLDER = f"a run folder is one that train.py or evaluate.py wrote: it holds {FILE}, metrics.csv, predictions.jsonl"
CURVES = ("telemetry/", "during/")
"""Prefixes of the metrics of fine-tuning that a report draws."""
Curves = dict[str, dict[int, float]]
"""Metric, as `telemetry/undesired/loss_on` -> step -> value."""


@dataclass(frozen=True)
class RecordedRun:
    """A record with its folder (None where a report.json kept the record)."""

    record: Record
    folder: Path | None = None

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return self.record.run

    @property
    def defense(self) -> str:
        """The run's defense; "evaluated" for a saved backbone that was only evaluated."""
        return "evaluated" if self.record.stage == "evaluate" else self.record.defense

    @property
    def model(self) -> str:
        """The model's name, else the last part of its path."""
        settings = self.record.config.get("model")
        if self.record.model != UNKNOWN or not isinstance(settings, dict):
            return self.record.model
        return str(settings.get("name_or_path") or UNKNOWN).rstrip("/").rpartition("/")[2]

    @property
    def seed(self) -> int:
        """The run's seed; -1 for a failed run without one."""
        return -1 if self.record.seed is None else self.record.seed

    @property
    def completed(self) -> bool:
        """Whether the run ended well; only such runs enter a mean."""
        return self.record.status == "completed"

    def measurement(self, name: str) -> Measurement | None:
        """The measurement `name`; None where it was not measured or is not finite."""
        found = self.record.metrics.get(name)
        return found if found and math.isfinite(found.value) else None

    def has(self, prefix: str) -> bool:
        """Whether any metric under `prefix` was measured."""
        return any(name.startswith(prefix) for name in self.record.metrics)

    @cached_property
    def has_vector(self) -> bool:
        """Whether a vector was on at any time. A run without one records `active/*` as a copy of `after/*`."""
        names = [name.removeprefix("active/") for name in self.record.metrics if name.startswith("active/")]
        differ = any(self.measurement(f"active/{name}") != self.measurement(f"after/{name}") for name in names)
        return differ or self.has("vector_on/")


def load_runs(folders: Sequence[Path]) -> list[RecordedRun]:
    """All runs under `folders`, each once, in an order that does not depend on the file system.

    A folder without runs below it gives the records that the report.json files below it keep. Raises DataError.
    """
    paths: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such directory; {RUN_FOLDER}")
        found = _below(folder, FILE) or kept_reports(folder)
        if not found:
            raise DataError(f"{folder}: no {FILE} in it or below; {RUN_FOLDER}")
        paths.update(dict.fromkeys(found))
    if not paths:
        raise DataError(f"no directory given; {RUN_FOLDER}")
    runs = [run for path in paths for run in load_records(path)]
    return sorted(runs, key=lambda run: (run.defense, run.seed, run.name, str(run.folder)))


def kept_reports(folder: Path) -> list[Path]:
    """The report.json files below `folder` that keep the records of runs which are gone; none where runs are there."""
    return [] if _below(folder, FILE) else _below(folder, "report.json")


def _below(folder: Path, name: str) -> list[Path]:
    """The files of this name below `folder`, each once; folders that are links are followed."""
    found, seen = set[Path](), set[Path]()
    for place, folders, files in os.walk(folder, followlinks=True):
        here = Path(place).resolve()
        if here in seen:  # a link to a folder above
            folders.clear()
        elif name in files:
            found.add(here / name)
        seen.add(here)
    return sorted(found)


def load_records(path: Path) -> list[RecordedRun]:
    """The run of a record.json, or those of a report.json. Raises DataError."""
    if path.name == FILE:
        return [RecordedRun(Record.read(path), path.parent)]
    records = read_json(path)
    if not isinstance(records, list):
        raise DataError(f"{path}: line 1: a report's records are a JSON array, this is a {type(records).__name__}")
    return [RecordedRun(Record.parse(record, path)) for record in records]


def load_curves(run: RecordedRun) -> tuple[Curves, str | None]:
    """The curves of fine-tuning, and why they are missing or incomplete (None: they are whole).

    Where a step is there twice, as after a resumed run, the last value counts.
    """
    path = run.folder / "metrics.csv" if run.folder else None
    if path is None or not path.is_file():
        return {}, f"{run.name}: no metrics.csv"
    curves: Curves = {}
    skipped = 0
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(line.replace("\0", "") for line in file):
            metric = row.get("metric") or ""
            if row.get("stage") != "finetune" or not metric.startswith(CURVES):
                continue
            try:
                value = float(row["value"])
                if math.isfinite(value):
                    curves.setdefault(metric, {})[int(float(row["step"]))] = value
            except (TypeError, ValueError, KeyError, OverflowError):
                skipped += 1
    if skipped:
        return curves, f"{run.name}: {skipped} unreadable row(s) of metrics.csv left out"
    return curves, None if curves else f"{run.name}: metrics.csv has no fine-tuning telemetry"


def load_predictions(run: RecordedRun) -> tuple[list[dict[str, Any]], str | None]:
    """The rows of predictions.jsonl, and why they are missing or incomplete (None: they are whole)."""
    path = run.folder / "predictions.jsonl" if run.folder else None
    if path is None or not path.is_file():
        return [], f"{run.name}: no predictions.jsonl"
    rows: list[dict[str, Any]] = []
    broken: list[int] = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("score"), int | float | None):
            rows.append(row)
        else:
            broken.append(number)
    if broken:
        lines = ", ".join(map(str, broken[:5])) + (" and more" if len(broken) > 5 else "")
        return rows, f"{run.name}: predictions.jsonl line {lines} is not a JSON object with a number as score: left out"
    return rows, None if rows else f"{run.name}: predictions.jsonl is empty"
