"""The leak probes: how often the behavior shows under each way of asking for it."""

from __future__ import annotations

from secvec.metrics import METRICS
from secvec.report.groups import Comparison
from secvec.report.tables import Row, Table, cell

READING = (
    "Undesired prompts answered with the behavior, with no vector on, by the way they are asked. A way that already "
    "works on the base is no leak of the fine-tuning. The leak rate above is each run's own worst probe, so its "
    "mean may lie above every row here."
)


def leak_table(comparison: Comparison) -> Table:
    """The behavior under each way of asking, after fine-tuning; each column's highest rate is marked.

    Where the behavior names a desired trait, that one too, in a section of its own.
    """
    leaks, desired = _rows(comparison, "leak", mark=True), _rows(comparison, "desired")
    sections = [("", leaks), ("Desired trait, asked in the same ways", desired)]
    return Table([column.label for column in comparison.columns], [section for section in sections if section[1]])


def _rows(comparison: Comparison, kind: str, mark: bool = False) -> list[Row]:
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
