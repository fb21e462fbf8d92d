"""Reading run folders: `record.json`, and beside it `metrics.csv` and `predictions.jsonl`, which may be absent."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from secvec.errors import DataError

RUN_FOLDER = "a run folder is one that `python -m secvec` wrote: it holds record.json, metrics.csv, predictions.jsonl"
REMEDY = "mend it, or delete the run folder and run it again"
Curves = dict[str, dict[int, float]]  # metric -> step -> value


@dataclass(frozen=True, slots=True)
class Reading:
    """One measured value with the interval over its `n` prompts (None where the record gives none)."""

    value: float
    low: float | None
    high: float | None
    n: int | None


@dataclass(frozen=True)
class Run:
    """One record with its folder (None when the record did not come from a file)."""

    record: Mapping[str, Any]
    folder: Path | None = None

    def field(self, name: str, default: str = "unknown") -> str:
        """A top-level field as text."""
        value = self.record.get(name)
        return default if value is None else str(value)

    @property
    def name(self) -> str:
        """The run's name, else its folder's."""
        return self.field("run", self.folder.name if self.folder else "unnamed")

    @property
    def defense(self) -> str:
        """The run's defense; "evaluated" for a saved backbone that was only questioned."""
        return "evaluated" if self.record.get("stage") == "evaluate" else self.field("defense")

    @property
    def model(self) -> str:
        """The model's name, else the last part of where it came from."""
        settings = (self.record.get("config") or {}).get("model")
        source = settings.get("name_or_path") if isinstance(settings, Mapping) else None
        return self.field("model", str(source or "unknown").rstrip("/").rpartition("/")[2])

    @property
    def seed(self) -> int:
        """The run's seed; -1 when a failed run does not know it."""
        seed = self.record.get("seed")
        return seed if isinstance(seed, int) else -1

    @property
    def completed(self) -> bool:
        """Whether the run ended well; only such runs enter a mean."""
        return self.record.get("status") == "completed"

    def reading(self, metric: str) -> Reading | None:
        """The value of `metric`; None when it was not measured or is not finite."""
        raw = (self.record.get("metrics") or {}).get(metric)
        cell = raw if isinstance(raw, Mapping) else {"value": raw}
        value = number(cell.get("value"))
        if value is None:
            return None
        low, high, n = number(cell.get("ci_low")), number(cell.get("ci_high")), number(cell.get("n"))
        # A number that is no mean over prompts (drift) is recorded with n = 1 and no interval.
        over_prompts = n is not None and not (n == 1 and low is None)
        return Reading(value, low, high, int(n) if n is not None and over_prompts else None)

    def has(self, prefix: str) -> bool:
        """Whether any metric under `prefix` was measured."""
        return any(key.startswith(prefix) for key in self.record.get("metrics") or {})

    @cached_property
    def has_vector(self) -> bool:
        """Whether a vector was on at any time. A run without one records `active/*` as a copy of `after/*`."""
        names = [key.removeprefix("active/") for key in self.record.get("metrics") or {} if key.startswith("active/")]
        differ = any(self.reading(f"active/{name}") != self.reading(f"after/{name}") for name in names)
        return differ or self.has("vector_on/")


def number(value: object) -> float | None:
    """A finite number, else None."""
    if type(value) is float:  # nearly always, and this is called a million times
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def load_runs(dirs: Sequence[Path]) -> list[Run]:
    """All runs under `dirs`, each folder once, in an order that does not depend on the file system.

    Where no run is left below a directory, its runs are those that a report.json there has kept.
    """
    found: dict[Path, None] = {}
    for root in dirs:
        if not root.is_dir():
            raise DataError(f"{root}: no such directory; {RUN_FOLDER}")
        here = sorted(path.resolve() for path in root.rglob("record.json")) or kept(root)
        if not here:
            raise DataError(f"{root}: no record.json in it or below; {RUN_FOLDER}")
        found.update(dict.fromkeys(here))
    if not found:
        raise DataError(f"no directory given; {RUN_FOLDER}")
    runs = [run for path in found for run in _load(path)]
    return sorted(runs, key=lambda run: (run.defense, run.seed, run.name, str(run.folder)))


def kept(root: Path) -> list[Path]:
    """The report.json files below `root` that stand for their runs; none where a run itself is there."""
    if any(root.rglob("record.json")):
        return []
    return sorted(path.resolve() for path in root.rglob("report.json"))


def _load(path: Path) -> list[Run]:
    if path.name == "record.json":
        return [Run(_checked(_parsed(path), path), path.parent)]
    records = _parsed(path)
    if not isinstance(records, list):
        raise DataError(f"{path}: line 1: a report's records are a JSON array, this is a {type(records).__name__}")
    return [Run(_checked(record, path)) for record in records]


def _parsed(path: Path) -> Any:
    """DataError names the file and the line of what is wrong with it."""
    try:
        # NaN and infinities are not JSON and no measurement: they are read as null.
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        where = f"{path}: line {error.lineno}, column {error.colno}"
        raise DataError(f"{where}: not valid JSON ({error.msg}); {REMEDY}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: line {line}: not UTF-8 text ({error.reason}); {REMEDY}") from error


def _checked(record: Any, path: Path) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{path}: line 1: a record is a JSON object, this is a {type(record).__name__}; {REMEDY}")
    if record.get("schema") != 1:
        raise DataError(f"{path}: schema is {record.get('schema')!r}, this version of secvec reads schema 1")
    # A run that failed on its settings may not know its defense or seed; one that enters a mean must.
    needed = (("status", str), ("defense", str), ("seed", int)) if record.get("status") == "completed" else ()
    for name, kind in needed:
        if not isinstance(record.get(name), kind):
            raise DataError(f"{path}: `{name}` should be {kind.__name__}, it is {record.get(name)!r}; {REMEDY}")
    for name in ("metrics", "config", "versions", "wall_seconds", "data"):
        if not isinstance(record.get(name) or {}, dict):
            raise DataError(f"{path}: `{name}` should be an object, it is {record[name]!r}; {REMEDY}")
    return record


def load_curves(run: Run) -> tuple[Curves, str | None]:
    """Fine-tuning telemetry, and why it is missing or incomplete (None: it is whole). The last of repeats counts."""
    path = run.folder / "metrics.csv" if run.folder else None
    if path is None or not path.is_file():
        return {}, f"{run.name}: no metrics.csv"
    curves: Curves = {}
    skipped = 0
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(line.replace("\0", "") for line in file):
            metric = row.get("metric") or ""
            if row.get("stage") != "finetune" or not metric.startswith("telemetry/"):
                continue
            try:
                value = float(row["value"])
                if math.isfinite(value):
                    curves.setdefault(metric.removeprefix("telemetry/"), {})[int(float(row["step"]))] = value
            except (TypeError, ValueError, KeyError, OverflowError):
                skipped += 1
    if skipped:
        return curves, f"{run.name}: {skipped} unreadable row(s) of metrics.csv left out"
    return curves, None if curves else f"{run.name}: metrics.csv has no fine-tuning telemetry"


def load_predictions(run: Run) -> tuple[list[dict[str, Any]], str | None]:
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
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken.append(number)
    if broken:
        lines = ", ".join(map(str, broken[:5])) + (" and more" if len(broken) > 5 else "")
        return rows, f"{run.name}: predictions.jsonl line {lines} is not a JSON object and is left out"
    return rows, None if rows else f"{run.name}: predictions.jsonl is empty"
