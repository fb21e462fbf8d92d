"""The leak probes: how often the behavior shows under each way of asking for it."""

from __future__ import annotations

from collections.abc import Sequence

from secvec.metrics import METRICS
from secvec.report.estimate import Estimate
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
    columns = (*comparison.bases, *comparison.groups)
    found = _by_way(comparison, "leak")
    worst = [max((e.mean for e in column if e), default=0.0) for column in zip(*found.values(), strict=True)]
    leaks = []
    for way, estimates in found.items():
        marks = ["worst" if e and e.mean == top > 0 else "" for e, top in zip(estimates, worst, strict=True)]
        leaks.append(_row(way, "leak_rate", estimates, marks))
    desired = [
        _row(way, "desired_rate", some, [""] * len(some)) for way, some in _by_way(comparison, "desired").items()
    ]
    sections = [("", leaks), ("Desired trait, asked in the same ways", desired)]
    return Table([column.label for column in columns], [(title, rows) for title, rows in sections if rows])


def _by_way(comparison: Comparison, head: str) -> dict[str, list[Estimate | None]]:
    """Way of asking -> the rate `head`/WAY of each column."""
    columns = (*comparison.bases, *comparison.groups)
    names = dict.fromkeys(
        key.partition("/")[2]
        for column in columns for run in column.runs for key in run.record.get("metrics") or {} if f"/{head}/" in key
    )  # fmt: skip
    return {name.removeprefix(f"{head}/"): [column.estimate(name) for column in columns] for name in names}


def _row(way: str, name: str, estimates: Sequence[Estimate | None], marks: Sequence[str]) -> Row:
    metric = METRICS[name]
    return Row(way, [cell(e, metric, mark=mark) for e, mark in zip(estimates, marks, strict=True)], metric.arrow)
