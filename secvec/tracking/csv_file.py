"""metrics.csv, which every run folder has: one row for each value (`stage,step,metric,value`)."""

import csv
import io
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from secvec.runs.files import write_atomic
from secvec.tracking.base import Tracker

HEADER = ["stage", "step", "metric", "value"]
OUTCOMES = "outcomes"


class CsvFile(Tracker):
    """Writes curves by step, and outcomes as a stage `outcomes` without steps. Tables are in the folder anyway."""

    def __init__(self, path: Path):
        self.path = path
        self._resumed: str | None = None

    def begin_stage(self, stage: str, resumed: bool) -> None:
        """Drops the rows of the stage; of a resumed one, when it goes on, those of the steps that are made again."""
        self._resumed = stage if resumed else None
        if not resumed:
            self._keep(lambda row: row[0] != stage)

    def curves(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Appends one row per value."""

        def earlier(row: Sequence[str]) -> bool:
            return int(row[1]) < step or (int(row[1]) == step and row[2] not in values)

        if stage == self._resumed:
            self._resumed = None
            self._keep(lambda row: row[0] != stage or (len(row) == len(HEADER) and earlier(row)))
        self._append([[stage, step, name, value] for name, value in values.items()])

    def outcomes(self, values: Mapping[str, float]) -> None:
        """Replaces earlier values of the same names."""
        self._keep(lambda row: row[0] != OUTCOMES or row[2] not in values)
        self._append([[OUTCOMES, "", name, value] for name, value in values.items()])

    def _append(self, rows: Sequence[Sequence[object]]) -> None:
        with self.path.open("a+b") as file:
            whole = not file.tell() or (file.seek(-1, os.SEEK_END), file.read(1))[1] == b"\n"
            # else a full disk, or a kill, has cut the last line
            file.write(b"" if whole else b"\n")
            file.write(_lines(rows).encode())

    def _keep(self, wanted: Callable[[list[str]], bool]) -> None:
        rows: list[list[str]] = []
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as stream:
                rows = [row for row in list(csv.reader(stream))[1:] if row and wanted(row)]
        write_atomic(self.path, _lines([HEADER, *rows]))


def _lines(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def read_curves(path: Path, stage: str) -> list[tuple[int, dict[str, float]]]:
    """The curves of `stage` in a metrics.csv: values by name, after each optimizer step."""
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["stage"] == stage and row["value"]]
    steps = groupby(rows, lambda row: int(row["step"]))
    return [(step, {row["metric"]: float(row["value"]) for row in some}) for step, some in steps]
