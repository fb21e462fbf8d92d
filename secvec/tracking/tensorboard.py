"""TensorBoard files in the run folder: a folder of events for each stage, and one for outcomes, tables and settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secvec.runs.record import Record
from secvec.tracking.base import Artifact, Cell, Tracker, flat

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

OUTCOMES = "outcomes"


class TensorBoard(Tracker):
    """Shows curves and outcomes as scalars, tables and artifacts as text, settings and outcomes under HPARAMS."""

    keeps_artifacts = True

    def __init__(self, folder: Path, num_predictions: int):
        self.folder, self.num_predictions = folder, num_predictions
        self.writers: dict[str, SummaryWriter] = {}
        self.measured: dict[str, float] = {}

    def open(self, record: Record) -> None:
        """Drops the outcomes of an earlier process: each sends all of them."""
        shutil.rmtree(self.folder / OUTCOMES, ignore_errors=True)

    def begin_stage(self, stage: str, resumed: bool) -> None:
        """Drops the events of the stage, unless it is resumed."""
        if not resumed:
            shutil.rmtree(self.folder / stage, ignore_errors=True)

    def curves(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars into the folder of the stage."""
        for name, value in values.items():
            self._writer(stage).add_scalar(name, value, step)

    def outcomes(self, values: Mapping[str, float]) -> None:
        """Writes scalars at step 0."""
        self.measured |= values
        for name, value in values.items():
            self._writer(OUTCOMES).add_scalar(name, value, 0)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Writes a Markdown table under TEXT."""
        lines = [columns, ["---"] * len(columns), *([_cell(cell) for cell in row] for row in rows)]
        self._writer(OUTCOMES).add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines))

    def artifact(self, artifact: Artifact) -> None:
        """Writes the facts under TEXT; TensorBoard keeps no files."""
        facts = {**artifact.facts, "kind": artifact.kind, "made_from": list(artifact.made_from)}
        text = f"{artifact.about}\n\n```json\n{json.dumps(facts, indent=1, default=str)}\n```"
        self._writer(OUTCOMES).add_text(f"artifact/{artifact.name}", text)

    def close(self, record: Record) -> None:
        """Writes status and error under TEXT, settings and outcomes under HPARAMS."""
        writer = self._writer(OUTCOMES)
        writer.add_text("status", ": ".join(filter(None, (record.status, record.error))))
        settings = {
            key: value if isinstance(value, int | float) else str(value) for key, value in flat(record.config).items()
        }
        writer.add_hparams(settings, self.measured, run_name=".")
        for each in self.writers.values():
            each.close()

    def _writer(self, name: str) -> SummaryWriter:
        if name not in self.writers:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.writers[name] = SummaryWriter(str(self.folder / name))
        return self.writers[name]


def _cell(cell: Cell) -> str:
    text = "" if cell is None else f"{cell:.4g}" if isinstance(cell, float) else str(cell)
    return text.replace("|", "\\|").replace("\n", " ")
