"""The tables as plain data, rendered alike to HTML, Markdown and the terminal."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from secvec.metrics import (
    MAIN_ROWS,
    METRICS,
    OPTIONAL,
    RUN_ROWS,
    SHOWN_BEHAVIOR,
    TWINS,
    VECTOR_ONLY,
    Metric,
    qualified,
)
from secvec.report.estimate import Estimate, best_of
from secvec.report.groups import Comparison, Group
from secvec.report.records import Run

ABSENT = "–"


@dataclass(frozen=True, slots=True)
class Cell:
    """A value with its interval, count ("3 × 100": seeds × prompts) and mark; `own`: interval over prompts."""

    value: str = ABSENT
    interval: str = ""
    count: str = ""
    own: bool = False
    best: bool = False
    mark: str = ""

    @property
    def text(self) -> str:
        """All of it in one line."""
        count = f"({self.count})" if self.count else ""
        return " ".join(part for part in (self.value, self.interval + "†" * self.own, count, self.mark) if part)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table; `arrow` shows the better direction, `about` explains the label."""

    label: str
    cells: Sequence[Cell]
    arrow: str = ""
    about: str = ""


@dataclass(frozen=True)
class Table:
    """Sections of rows under the same columns; one without a title has no heading line. `left_out`: what is missing."""

    columns: Sequence[str]
    sections: list[tuple[str, list[Row]]] = field(default_factory=list)
    left_out: str = ""

    def capped(self, most: int) -> Table:
        """The first `most` rows; `left_out` then says how many there are in all."""
        count = sum(len(rows) for _, rows in self.sections)
        if count <= most:
            return self
        kept, room = [], most
        for title, rows in self.sections:
            if room > 0:
                kept.append((title, rows[:room]))
            room -= len(rows)
        return Table(self.columns, kept, f"The first {most:,} of {count:,} rows.")

    def turned(self) -> Table:
        """Rows as columns and columns as rows: for more columns than fit. A section's title goes before its labels."""
        lines = [(title, row) for title, rows in self.sections for row in rows]
        names = [f"{title}: {row.label} {row.arrow}".removeprefix(": ").strip() for title, row in lines]
        rows = [Row(column, [row.cells[i] for _, row in lines]) for i, column in enumerate(self.columns)]
        return Table(names, [("", rows)] if lines else [])

    @property
    def footnote(self) -> bool:
        """Whether any cell carries the dagger."""
        return any(cell.own for _, rows in self.sections for row in rows for cell in row.cells)


def cell(found: Estimate | None, metric: Metric, best: bool = False, mark: str = "") -> Cell:
    """An estimate as text; without an estimate, a dash."""
    if found is None:
        return Cell()
    seeds = len(found.by_seed)
    if found.prompts is None:
        count = f"{seeds} seed{'s' * (seeds != 1)}"
    else:
        low, high = found.prompts
        count = f"{seeds} × {low}" if low == high else f"{seeds} × {low}…{high}"
    shown = "" if found.kind == "none" else f"[{metric.text(found.low)}, {metric.text(found.high)}]"
    return Cell(metric.text(found.mean), shown, count, found.kind == "own", best, mark)


def main_rows(comparison: Comparison) -> list[str]:
    """The metrics that have a row in the main table, in order."""
    columns = (*comparison.bases, *comparison.groups)

    def told(name: str) -> bool:
        found = [column.estimate(name) for column in columns]
        twins = [column.estimate(TWINS[name]) for column in columns] if name in TWINS else [None] * len(columns)
        return any(e and (t is None or e.by_seed != t.by_seed) for e, t in zip(found, twins, strict=True))

    return [name for name in MAIN_ROWS if name not in OPTIONAL or told(name)]


def main_table(comparison: Comparison) -> Table:
    """Base model and every group after fine-tuning, as deployed: no vector is on."""
    bases, groups = comparison.bases, comparison.groups
    rows = []
    for name in main_rows(comparison):
        metric = METRICS[name]
        found = [group.estimate(name) for group in groups]
        best = best_of(found, metric)
        cells = [cell(base.estimate(name), metric) for base in bases]
        cells += [cell(e, metric, best == i) for i, e in enumerate(found)]
        rows.append(Row(metric.label, cells, metric.arrow, metric.about))
    return Table([c.label for c in (*bases, *groups)], [("", rows)])


def mechanism_table(comparison: Comparison) -> Table:
    """What the vector does while it is on; columns are the groups."""
    groups = comparison.groups

    def row(label: str, about: str, name: str, found: Sequence[Estimate | None], arrow: bool = True) -> Row | None:
        metric = METRICS[name]
        cells = [cell(e, metric) for e in found]
        return Row(label, cells, metric.arrow if arrow else "", about) if any(found) else None

    def phase(name: str, phase: str) -> list[Estimate | None]:
        return [group.estimate(name, phase) for group in groups]

    loss = "behavior_loss"
    base_of = {base.scope: base.estimate(loss) for base in comparison.bases}
    sections: list[tuple[str, list[Row | None]]] = [
        ("Loss on held-out undesired samples, nats per token", [
            row("Base model", "before anything is trained", loss, [base_of[g.scope] for g in groups]),
            row("Vector on", "after the vector stage, before fine-tuning", loss, phase(loss, "vector_on")),
            row("Vector off", "the same moment without the vector: should equal the base", loss,
                phase(loss, "vector_off")),
            row("Floor", "what direct fine-tuning without a defense reaches", loss,
                [comparison.floor(g) for g in groups]),
            row("Fine-tuned, vector on", "after fine-tuning", loss, phase(loss, "active")),
            row("Fine-tuned, vector off", "after fine-tuning, as deployed", loss, phase(loss, "after")),
        ]),
    ]  # fmt: skip
    rates = [name for name in main_rows(comparison) if name not in (loss, "deactivation_gap")]
    for title, key in (("Before fine-tuning, vector on", "vector_on"), ("After fine-tuning, vector on", "active")):
        lines = [row(METRICS[n].label, METRICS[n].about, n, phase(n, key), n not in SHOWN_BEHAVIOR) for n in rates]
        sections.append((title, lines))
    whole = ("suppression_ratio", "drift", "deactivation_gap")
    lines = [row(METRICS[n].label, METRICS[n].about, n, [g.estimate(n) for g in groups]) for n in whole]
    sections.append(("Whole run", lines))
    kept = [(title, [line for line in lines if line]) for title, lines in sections]
    return Table([g.label for g in groups], [(title, lines) for title, lines in kept if lines])


def run_table(runs: Sequence[Run], comparison: Comparison, root: Path, of: int | None = None) -> Table:
    """One row for each run, failed ones too; values after fine-tuning. `of`: how many there are, if not all."""
    label = {id(run): group.label for group in comparison.groups for run in group.runs}
    names = [n for n in RUN_ROWS if n not in OPTIONAL or any(run.reading(qualified("after", n)) for run in runs)]
    rows = []
    for run in runs:
        named = (label.get(id(run), run.defense), str(run.record.get("seed", ABSENT)), run.field("status"))
        cells = [Cell(text) for text in named]
        for name in names:
            told = name not in VECTOR_ONLY or run.has_vector
            reading = run.reading(qualified("after", name)) if told else None
            cells.append(Cell(METRICS[name].text(reading.value)) if reading else Cell())
        commit = run.field("commit", ABSENT)[:7] + " changed" * bool(run.record.get("dirty"))
        cells += [_wall(run), Cell(commit)]
        folder = folder_of(run, root)
        rows.append(Row(folder, cells, about="" if Path(folder).name == run.name else f"run {run.name}"))
    titles = [f"{METRICS[n].label} {METRICS[n].arrow}".strip() for n in names]
    left_out = f"The first {len(runs):,} of {of:,} runs; report.csv has all." if of and of > len(runs) else ""
    return Table(["Defense", "Seed", "Status", *titles, "Wall time, s", "Commit"], [("", rows)], left_out)


def _wall(run: Run) -> Cell:
    """Seconds in all, and for each stage."""
    stages = {k: float(v) for k, v in (run.record.get("wall_seconds") or {}).items() if isinstance(v, (int, float))}
    if not stages:
        return Cell()
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items())
    return Cell(f"{sum(stages.values()):.1f}", count=parts)


def folder_of(run: Run, root: Path) -> str:
    """The run's folder as seen from the report."""
    return Path(os.path.relpath(run.folder, root.resolve())).as_posix() if run.folder else ABSENT


def column_phases(group: Group) -> list[tuple[str, str]]:
    """Which answers of a group are shown: (phase, label); with a vector also those given while it is on."""
    active = [("active", f"{group.label}, vector ON")] if group.has_vector else []
    return [*active, ("after", f"{group.label}, vector off" if active else group.label)]
