"""What a run sends to its trackers and when: the one place that says so, whatever the trackers are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secvec.metrics import METRICS, metric_of
from secvec.report.samples import shorten
from secvec.settings.schema import LoggerSettings
from secvec.tracking.artifacts import artifacts
from secvec.tracking.base import Cell, Record, Tracker, Trackers
from secvec.tracking.csv_file import CsvFile
from secvec.tracking.tensorboard import TensorBoard
from secvec.tracking.wandb import Wandb

WAYS = ("leak", "desired")
"""Metrics of which each way of asking has its own."""
OUTCOMES = ("metric", "value", "ci_low", "ci_high", "n", "better", "about")
PREDICTIONS = ("phase", "stream", "id", "prompt", "response", "reference", "verdict", "score", "coherent", "shown")


def tracker_for(folder: Path, settings: LoggerSettings, fresh: bool) -> Tracker:
    """metrics.csv always, and the chosen tracker beside it; `fresh`: what is in the folder is run again."""
    chosen: list[Tracker] = [CsvFile(folder / "metrics.csv")]
    if settings.name == "tensorboard":
        chosen.append(TensorBoard(folder / "tensorboard"))
    if settings.name == "wandb":
        chosen.append(Wandb(folder, settings, fresh))
    return Trackers(chosen)


class Session:
    """From the begin of a run to its end, well or not. Leaving the block ends what `open` began.

    `record` is the run's own, which it goes on changing; its end must be in it when the block is left.
    """

    def __init__(self, tracker: Tracker, folder: Path, record: Record, settings: LoggerSettings):
        self.tracker, self.folder, self.record, self.settings = tracker, folder, record, settings
        self.opened = False
        self.sent: dict[str, Any] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        if self.opened:
            self.close()

    def open(self) -> None:
        """The run begins."""
        self.tracker.open(self.record)
        self.opened = True

    @contextmanager
    def stage(self) -> Iterator[None]:
        """A stage in the block; what it measured is sent when it ends, well or not."""
        try:
            yield
        finally:
            self._send_new()

    def close(self) -> None:
        """The run has ended: what it measured with intervals, some of its answers, what it took in and made."""
        self._send_new()
        if self.record["metrics"]:
            self.tracker.table("outcomes", OUTCOMES, outcome_rows(self.record))
        if rows := prediction_rows(self.folder / "predictions.jsonl", self.settings.num_predictions):
            self.tracker.table("predictions", PREDICTIONS, rows)
        if self.tracker.keeps_artifacts:
            for artifact in artifacts(self.folder, self.record, self.settings.upload_vector):
                self.tracker.artifact(artifact)
        self.tracker.close(self.record)

    def _send_new(self) -> None:
        """Metrics that are new in the record, of this sitting or of one before."""
        new = {name: metric for name, metric in self.record["metrics"].items() if self.sent.get(name) != metric}
        self.sent |= new
        if new:
            self.tracker.outcomes(values_of(new))


def values_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of a record without their intervals."""
    return {name: float(metric["value"]) for name, metric in metrics.items()}


def send_failure(folder: Path, record: Record, settings: LoggerSettings) -> None:
    """For a run that could not say how it ended: killed, or stopped by a wrong setting before it began.

    `record` is what its folder holds, or what was known of it; it goes on in the run that its trackers have of it.
    """
    known = {"key": record["content"], "wall_seconds": {}} | dict(record)
    tracker = tracker_for(folder, settings, fresh=False)
    tracker.open(known)
    tracker.outcomes(values_of(known["metrics"]))
    tracker.close(known)


def outcome_rows(record: Record) -> list[list[Cell]]:
    """One row per metric, with its interval, better direction and meaning."""
    rows: list[list[Cell]] = []
    for name, measured in record["metrics"].items():
        short = name.partition("/")[2] or name
        known = metric_of(short) if short in METRICS or short.split("/")[0] in WAYS else None
        values: list[Cell] = [measured[field] for field in ("value", "ci_low", "ci_high", "n")]
        rows.append([name, *values, known.better if known else None, known.about if known else ""])
    return rows


def prediction_rows(path: Path, most: int) -> list[list[Cell]]:
    """The first `most` answers of each phase and stream. Texts are cut as in the report, shorter where the behavior
    is sensitive, and the last cell says so: see secvec/report/samples.py."""
    rows: list[list[Cell]] = []
    taken: Counter[tuple[str, str]] = Counter()
    for line in path.read_text(encoding="utf-8").split("\n") if path.is_file() and most else []:
        row = json.loads(line) if line else None
        if row is None or taken[row["phase"], row["stream"]] >= most:
            continue
        taken[row["phase"], row["stream"]] += 1
        texts = [shorten(row[name], row["sensitive"]) for name in ("prompt", "response", "reference")]
        mark = "; ".join(sorted({text.mark for text in texts if text.mark}))
        others: list[Cell] = [row["verdict"], row["score"], row["coherent"], mark]
        rows.append([row["phase"], row["stream"], row["id"], *(text.text for text in texts), *others])
    return rows
