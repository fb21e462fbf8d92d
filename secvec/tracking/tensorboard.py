"""TensorBoard files in the run folder: one folder of events per stage, and `outcomes` with tables and settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secvec.tracking.base import Artifact, Cell, Record, Tracker, flat

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

OUTCOMES = "outcomes"


class TensorBoard(Tracker):
    """Curves and outcomes as scalars, tables and artifacts as text, settings beside outcomes under HPARAMS."""

    keeps_artifacts = True

    def __init__(self, folder: Path):
        self.folder = folder
        self.writers: dict[str, SummaryWriter] = {}
        self.measured: dict[str, float] = {}

    def open(self, record: Record) -> None:
        """Outcomes are sent whole by each process that works on a run: those of an earlier one go."""
        shutil.rmtree(self.folder / OUTCOMES, ignore_errors=True)

    def begin_stage(self, stage: str, resumed: bool) -> None:
        """Drops the events of the stage, unless it goes on."""
        if not resumed:
            shutil.rmtree(self.folder / stage, ignore_errors=True)

    def curves(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Scalars of the stage's own folder."""
        for name, value in values.items():
            self._writer(stage).add_scalar(name, value, step)

    def outcomes(self, values: Mapping[str, float]) -> None:
        """Scalars at step 0."""
        self.measured |= values
        for name, value in values.items():
            self._writer(OUTCOMES).add_scalar(name, value, 0)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A Markdown table under TEXT."""
        lines = [columns, ["---"] * len(columns), *([_cell(cell) for cell in row] for row in rows)]
        self._writer(OUTCOMES).add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines))

    def artifact(self, artifact: Artifact) -> None:
        """Its facts under TEXT; TensorBoard keeps no files."""
        facts = {**artifact.facts, "kind": artifact.kind, "made_from": list(artifact.made_from)}
        text = f"{artifact.about}\n\n```json\n{json.dumps(facts, indent=1, default=str)}\n```"
        self._writer(OUTCOMES).add_text(f"artifact/{artifact.name}", text)

    def close(self, record: Record) -> None:
        """How it ended under TEXT; settings and outcomes under HPARAMS."""
        writer = self._writer(OUTCOMES)
        writer.add_text("status", ": ".join(str(record[key]) for key in ("status", "error") if record.get(key)))
        settings = {key: value if isinstance(value, int | float) else str(value) for key, value in
                    flat(record["config"]).items()}  # fmt: skip
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
