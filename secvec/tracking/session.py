"""What a run sends to its trackers, and when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secvec.errors import ConfigError
from secvec.metrics import Measurements, metric_of
from secvec.runs.excerpt import shorten
from secvec.runs.files import read_lines
from secvec.runs.record import Record
from secvec.settings.trainer import LoggerSettings
from secvec.tracking.artifacts import artifacts
from secvec.tracking.base import Cell, Tracker, Trackers
from secvec.tracking.csv_file import CsvFile
from secvec.tracking.tensorboard import TensorBoard
from secvec.tracking.wandb import Wandb

OUTCOMES = ("metric", "value", "ci_low", "ci_high", "n", "better", "about")
PREDICTIONS = ("phase", "stream", "id", "prompt", "response", "reference", "verdict", "score", "coherent", "shown")


def tracker_for(folder: Path, settings: LoggerSettings, fresh: bool) -> Trackers:
    """The loggers of `settings` as one tracker, and metrics.csv always; `fresh` begins a new run in `folder`.

    Raises ConfigError for a logger that cannot be made.
    """
    trackers: list[Tracker] = [CsvFile(folder / "metrics.csv")]
    if settings.tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard", settings.tensorboard.num_predictions))
    if settings.wandb:
        trackers.append(Wandb(folder, settings.wandb, fresh))
    for name, logger in (settings.model_extra or {}).items():
        from secvec.tracking.lightning import LightningTracker  # slow to import

        try:
            trackers.append(LightningTracker(logger.build()))
        except Exception as error:
            raise ConfigError(f"logger.{name}: {logger.target}: {error}") from None
    return Trackers(*trackers)


class Session:
    """Sends a run to its trackers, from `open` to the end of the block, whether the run ends well or not.

    `record` is the record of the run itself, which changes meanwhile and has its status when the block ends.
    """

    def __init__(self, tracker: Trackers, folder: Path, record: Record, settings: LoggerSettings):
        self.tracker, self.folder, self.record = tracker, folder, record
        self.upload_vector = settings.wandb is not None and settings.wandb.upload_vector
        self.opened = False
        self.sent: dict[str, Any] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *error: object) -> None:
        if self.opened:
            self.close()

    def open(self) -> None:
        """Begins the run."""
        self.tracker.open(self.record)
        self.opened = True

    @contextmanager
    def stage(self) -> Iterator[None]:
        """Runs a stage in the block, and sends what it measured when it ends, well or not."""
        try:
            yield
        finally:
            self._send_new()

    def close(self) -> None:
        """Sends the tables and artifacts, and ends the run, also where one of them could not be sent."""
        try:
            self._send_new()
            if self.record.metrics:
                self.tracker.table("outcomes", OUTCOMES, outcome_rows(self.record))
            for tracker in self.tracker.trackers:
                if rows := prediction_rows(self.folder / "predictions.jsonl", tracker.num_predictions):
                    tracker.table("predictions", PREDICTIONS, rows)
            if any(tracker.keeps_artifacts for tracker in self.tracker.trackers):
                for artifact in artifacts(self.folder, self.record, self.upload_vector):
                    self.tracker.artifact(artifact)
        finally:
            self.tracker.close(self.record)

    def _send_new(self) -> None:
        """Sends the metrics of the record that are new, or that changed."""
        new = {name: metric for name, metric in self.record.metrics.items() if self.sent.get(name) != metric}
        self.sent |= new
        if new:
            self.tracker.outcomes(values_of(new))


def values_of(metrics: Measurements) -> dict[str, float]:
    """The metrics of a record without their intervals."""
    return {name: measured.value for name, measured in metrics.items()}


def send_failure(folder: Path, record: Record, settings: LoggerSettings) -> None:
    """Ends a run at its trackers that could not do so itself: it was killed, or its settings were wrong.

    `record` is that of the folder, or what is known without one.
    """
    tracker = tracker_for(folder, settings, fresh=False)
    tracker.open(record)
    tracker.outcomes(values_of(record.metrics))
    tracker.close(record)


def outcome_rows(record: Record) -> list[list[Cell]]:
    """One row for each metric, with its interval, better direction and meaning."""
    rows: list[list[Cell]] = []
    for name, measured in record.metrics.items():
        known = metric_of(name)
        values: list[Cell] = [measured.value, measured.ci_low, measured.ci_high, measured.n]
        rows.append([name, *values, known.better if known else None, known.about if known else ""])
    return rows


def prediction_rows(path: Path, most: int) -> list[list[Cell]]:
    """The first `most` answers of each phase and stream.

    Texts are cut as in the report (secvec/runs/excerpt.py), shorter for a sensitive behavior; the last cell says so.
    """
    rows: list[list[Cell]] = []
    taken: Counter[tuple[str, str]] = Counter()
    for row in read_lines(path) if most else []:
        if taken[row["phase"], row["stream"]] >= most:
            continue
        taken[row["phase"], row["stream"]] += 1
        texts = [shorten(row[name], row["sensitive"]) for name in ("prompt", "response", "reference")]
        mark = "; ".join(sorted({text.mark for text in texts if text.mark}))
        others: list[Cell] = [row["verdict"], row["score"], row["coherent"], mark]
        rows.append([row["phase"], row["stream"], row["id"], *(text.text for text in texts), *others])
    return rows
