"""The tables as plain data, rendered alike to HTML, Markdown and the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from secvec.metrics import METRICS, OF_RUN, VECTOR_ONLY, Metric, qualified
from secvec.report.estimate import Estimate, best_of
from secvec.report.groups import Comparison, Group
from secvec.report.records import RecordedRun
from secvec.runs.record import PARTS_OF_STAGES

ABSENT = "–"
MAIN_ROWS = [name for name in METRICS if name not in OF_RUN or name == "deactivation_gap"]
RUN_ROWS = (
    "behavior_rate",
    "refusal_rate",
    "desired_rate",
    "task_accuracy",
    "retained_accuracy",
    "suppression_ratio",
    "drift",
)
ALWAYS = frozenset({"behavior_rate", "refusal_rate", "coherence_rate", "behavior_loss", "suppression_ratio", "drift"})
"""They have a row even where no record has them."""
TWINS = {"behavior_rate_plus": "behavior_rate", "wanted_rate": "refusal_rate"}
"""The first has no row where it equals the second."""
SHOWN_BEHAVIOR = frozenset(
    {"behavior_rate", "behavior_rate_plus", "behavior_score", "harmfulness_score", "refusal_rate", "wanted_rate"}
)
"""With the vector on the behavior is what the vector is for: no direction is better."""
LEAKS = (
    "Undesired prompts answered with the behavior, with no vector on, by the way they are asked. A way that already "
    "works on the base is no leak of the fine-tuning. The leak rates above are each run's own worst probe, so their "
    "means may lie above every row here."
)


@dataclass(frozen=True, slots=True)
class Cell:
    """A value with its interval, count ("3 × 100": seeds × prompts) and mark; `own`: interval over prompts."""

    value: str = ABSENT
    interval: str = ""
    count: str = ""
    own: bool = False
    best: bool = False
    mark: str = ""
    over: str = "seeds"
    """What the interval is over where it is not `own`."""

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

    @property
    def title(self) -> str:
        """The label with the arrow."""
        return f"{self.label} {self.arrow}".strip()


@dataclass(frozen=True)
class Table:
    """Sections of rows under the same columns; one without a title has no heading line."""

    columns: Sequence[str]
    sections: list[tuple[str, list[Row]]] = field(default_factory=list)
    title: str = ""
    corner: str = ""
    """The head of the first column."""
    caption: str = ""
    """Says more than the title; empty: the title is enough."""
    reading: str = ""
    """How to read it."""
    left_out: str = ""
    """What is missing."""

    def capped(self, most: int) -> Table:
        """The first `most` rows; `left_out` then names their number in all."""
        count = sum(len(rows) for _, rows in self.sections)
        if count <= most:
            return self
        kept, room = [], most
        for title, rows in self.sections:
            if room > 0:
                kept.append((title, rows[:room]))
            room -= len(rows)
        return replace(self, sections=kept, left_out=f"The first {most:,} of {count:,} rows.")

    def turned(self) -> Table:
        """Rows as columns and columns as rows: for more columns than fit. A section's title goes before its labels."""
        lines = [(title, row) for title, rows in self.sections for row in rows]
        names = [f"{title}: {row.title}".removeprefix(": ") for title, row in lines]
        rows = [Row(column, [row.cells[i] for _, row in lines]) for i, column in enumerate(self.columns)]
        return replace(self, columns=names, sections=[("", rows)] if lines else [], corner="Configuration")

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

    def is_new(group: Group, name: str) -> bool:
        found, twin = group.estimate(name), group.estimate(TWINS[name]) if name in TWINS else None
        return found is not None and (twin is None or found.by_seed != twin.by_seed)

    return [name for name in MAIN_ROWS if name in ALWAYS or any(is_new(column, name) for column in comparison.columns)]


def main_table(comparison: Comparison) -> Table:
    """Base model and every group after fine-tuning, as deployed: no vector is on."""
    rows = []
    for name in main_rows(comparison):
        metric = METRICS[name]
        found = [group.estimate(name) for group in comparison.groups]
        best = best_of(found, metric)
        cells = [cell(base.estimate(name), metric) for base in comparison.bases]
        cells += [cell(e, metric, best == i) for i, e in enumerate(found)]
        rows.append(Row(metric.label, cells, metric.arrow, metric.about))
    names = [column.label for column in comparison.columns]
    return Table(names, [("", rows)], "Results", "Metric", "Results after fine-tuning")


def leak_table(comparison: Comparison) -> Table:
    """The behavior under each way of asking, after fine-tuning; each column's highest rate is marked.

    Where the behavior names a desired trait, that one too, in a section of its own.
    """
    rates, desired = _ways(comparison, "leak", mark=True), _ways(comparison, "desired")
    sections = [("", rates), ("Desired trait, asked in the same ways", desired)]
    names = [column.label for column in comparison.columns]
    return Table(names, [section for section in sections if section[1]], "Leak probes", "Probe", reading=LEAKS)


def _ways(comparison: Comparison, kind: str, mark: bool = False) -> list[Row]:
    """A row for each way of asking for which some column has the rate `kind`/WAY; `mark` names each column's worst."""
    metric, columns = METRICS[f"{kind}_rate"], comparison.columns
    recorded = (name for column in columns for run in column.runs for name in run.record.metrics)
    ways = dict.fromkeys(name.partition(f"/{kind}/")[2] for name in recorded if f"/{kind}/" in name)
    found = {way: [column.estimate(f"{kind}/{way}") for column in columns] for way in ways}
    worst = [max((e.mean for e in column if e), default=0.0) for column in zip(*found.values(), strict=True)]
    rows = []
    for way, estimates in found.items():
        marks = ["worst" if mark and e and e.mean == top > 0 else "" for e, top in zip(estimates, worst, strict=True)]
        rows.append(Row(way, [cell(e, metric, mark=m) for e, m in zip(estimates, marks, strict=True)], metric.arrow))
    return rows


def mechanism_table(comparison: Comparison, whole: Comparison) -> Table:
    """What the vector does while it is on; columns are the groups of `comparison`, a part of `whole`."""
    groups, loss = comparison.groups, "behavior_loss"

    bases = [comparison.base_of(group).estimate(loss) for group in groups]

    def of(name: str, phase: str = "after") -> list[Estimate | None]:
        return [group.estimate(name, phase) for group in groups]

    Line = tuple[str, str, str, list[Estimate | None]]  # metric, label, about, estimates
    losses: list[Line] = [
        (loss, "Base model", "before anything is trained", bases),
        (loss, "Vector on", "after the vector stage, before fine-tuning", of(loss, "vector_on")),
        (loss, "Vector off", "the same moment without the vector: should equal the base", of(loss, "vector_off")),
        (loss, "Floor", "what the same fine-tuning without a defense reaches", list(map(whole.floor, groups))),
        (loss, "Fine-tuned, vector on", "after fine-tuning", of(loss, "active")),
        (loss, "Fine-tuned, vector off", "after fine-tuning, as deployed", of(loss)),
    ]

    def lines(names: Iterable[str], phase: str = "after") -> list[Line]:
        return [(name, METRICS[name].label, METRICS[name].about, of(name, phase)) for name in names]

    rates = [name for name in main_rows(comparison) if name not in (loss, "deactivation_gap")]
    sections = {
        "Loss on held-out undesired samples, nats per token": losses,
        "Before fine-tuning, vector on": lines(rates, "vector_on"),
        "After fine-tuning, vector on": lines(rates, "active"),
        "Whole run": lines(("suppression_ratio", "drift", "deactivation_gap")),
    }
    arrows = {name: "" if name in SHOWN_BEHAVIOR else metric.arrow for name, metric in METRICS.items()}
    table = Table([group.label for group in groups], title="Mechanism", corner="Measurement")
    for title, found in sections.items():
        rows = [
            Row(label, [cell(e, METRICS[name]) for e in estimates], arrows[name], about)
            for name, label, about, estimates in found
            if any(estimates)
        ]
        if rows:
            table.sections.append((title, rows))
    return table


def run_table(runs: Sequence[RecordedRun], comparison: Comparison, root: Path, of: int | None = None) -> Table:
    """One row for each run, failed ones too; values after fine-tuning. `of`: how many there are, if not all."""
    label = {id(run): group.label for group in comparison.groups for run in group.runs}
    names = [n for n in RUN_ROWS if n in ALWAYS or any(run.measurement(qualified("after", n)) for run in runs)]
    rows = []
    for run in runs:
        seed = ABSENT if run.record.seed is None else str(run.record.seed)
        cells = [Cell(label.get(id(run), run.defense)), Cell(seed), Cell(run.record.status)]
        for name in names:
            found = run.measurement(qualified("after", name)) if name not in VECTOR_ONLY or run.has_vector else None
            cells.append(Cell(METRICS[name].text(found.value)) if found else Cell())
        commit = (run.record.commit or ABSENT)[:7] + " changed" * run.record.dirty
        cells += [_wall(run), Cell(commit)]
        folder = folder_of(run, root)
        rows.append(Row(folder, cells, about="" if Path(folder).name == run.name else f"run {run.name}"))
    columns = ["Defense", "Seed", "Status", *(METRICS[n].title for n in names), "Wall time, s", "Commit"]
    left_out = f"The first {len(runs):,} of {of:,} runs; report.csv has all." if of and of > len(runs) else ""
    return Table(columns, [("", rows)], "Runs", "Run folder", "All runs", left_out=left_out)


def _wall(run: RecordedRun) -> Cell:
    """Seconds in all, and for each stage."""
    stages = run.record.wall_seconds
    if not stages:
        return Cell()
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in stages.items())
    whole = sum(seconds for name, seconds in stages.items() if name not in PARTS_OF_STAGES)
    return Cell(f"{whole:.1f}", count=parts)


def folder_of(run: RecordedRun, root: Path) -> str:
    """The run's folder as seen from the report."""
    return Path(os.path.relpath(run.folder, root.resolve())).as_posix() if run.folder else ABSENT


def column_phases(group: Group) -> list[tuple[str, str]]:
    """Which answers of a group are shown: (phase, label); with a vector also those given while it is on."""
    active = [("active", f"{group.label}, vector ON")] if group.has_vector else []
    return [*active, ("after", f"{group.label}, vector off" if active else group.label)]
