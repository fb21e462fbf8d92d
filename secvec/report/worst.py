"""The worst case of each defense: a defense is as good as its configuration with the highest behavior rate."""

import re
from collections.abc import Iterable
from dataclasses import replace
from statistics import median

from secvec.metrics import METRICS
from secvec.report.groups import Comparison, Group
from secvec.report.records import RecordedRun
from secvec.report.tables import ABSENT, Cell, Row, Table, cell

MANY = 8
"""More configurations than this do not fit side by side."""
BESIDE = (
    "behavior_rate",
    "task_accuracy",
    "refusal_rate",
    "over_refusal_rate",
    "retained_accuracy",
    "coherence_rate",
)
PRICE = ("Needs", "Time ÷ plain", "Memory")
LEARNS = 0.9
"""The plain fine-tune learns the task where its accuracy is at least this share of its highest on that task."""
HOW = re.compile(r"(optimizer|scheduler|finetune|tune|trainer|data\.num_(harmful|benign)|data\.harmful_ratio)\b")
"""Settings that say how a task is learned, not which."""
READING = (
    "Of every defense the configuration with the highest behavior rate (of several, the one with the lowest task "
    "accuracy), and what the others reach at best and at worst; the best worst case stands first. The highest of many "
    "measured rates is in part chance: it overstates a little, and a defense that was tried on more configurations had "
    "more chances to fail. The price stands beside: what the defense needs, the time of its fine-tune in that "
    "configuration as a multiple of the plain one's, and the most memory that its process held."
)


def worst(groups: Iterable[Group]) -> Group | None:
    """The group with the highest behavior rate, of several the lowest task accuracy; None if none was measured."""

    def rank(group: Group) -> tuple[float, float]:
        rate, skill = group.estimate("behavior_rate"), group.estimate("task_accuracy")
        return (rate.mean if rate else -1.0, -(skill.mean if skill else 0.0))

    measured = [group for group in groups if group.estimate("behavior_rate")]
    return max(measured, key=rank, default=None)


def by_defense(groups: Iterable[Group]) -> dict[str, list[Group]]:
    """The groups of every defense, in order."""
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.defense, []).append(group)
    return found


def learned(comparison: Comparison) -> dict[str, Group | None]:
    """The groups in whose configuration the plain fine-tune learns the task, or was not run: label -> its group."""

    def place(group: Group) -> tuple[object, ...]:
        """The configuration, without what belongs to a defense and its vector."""
        values = zip(comparison.keys, group.values, strict=True)
        return (group.scope, *((k, v) for k, v in values if v and k.split(".")[0] not in ("defense", "vector")))

    def skill(group: Group | None) -> float | None:
        found = group.estimate("task_accuracy") if group else None
        return found.mean if found else None

    def task(of: tuple[object, ...]) -> tuple[object, ...]:
        """What is to be learned in a configuration: without how, and from how many samples."""
        scope, *values = of
        return (scope, *(one for one in values if not HOW.match(str(one[0]))))  # type: ignore[index]

    plain = {place(group): group for group in comparison.groups if group.defense == "none"}
    most: dict[tuple[object, ...], float] = {}
    for where, group in plain.items():
        most[task(where)] = max(skill(group) or 0.0, most.get(task(where), 0.0))
    beside = [(group, plain.get(place(group))) for group in comparison.groups]
    return {
        group.label: found
        for group, found in beside
        if (value := skill(found)) is None or value >= LEARNS * most[task(place(group))]
    }


def worst_table(comparison: Comparison) -> Table:
    """One row for each defense: its worst configuration, that one's utility and price; the best worst case first.

    Empty without several configurations. Those in which the plain fine-tune does not learn the task are left out.
    """
    plain = learned(comparison)
    kept = [group for group in comparison.groups if group.label in plain]
    ranked: list[tuple[float, Row]] = []
    names = [name for name in BESIDE if any(group.estimate(name) for group in kept)]
    for defense, groups in by_defense(kept).items():
        found = worst(groups)
        if found is None:
            continue
        rates = [e.mean for group in groups if (e := group.estimate("behavior_rate"))]
        text = METRICS["behavior_rate"].text
        cells = [Cell(found.label.removeprefix(defense).lstrip(" ·") or "the only one")]
        cells += [cell(found.estimate(name), METRICS[name]) for name in names]
        cells.append(Cell(f"{text(min(rates))} to {text(max(rates))}", count=f"{len(rates)} configurations"))
        cells += _price(found, plain[found.label])
        ranked.append((max(rates), Row(defense, cells)))
    rows = [row for _, row in sorted(ranked, key=lambda one: one[0])]
    heads = [METRICS[name].title for name in names]
    columns = ["Worst configuration", *heads, "Behavior rate, all configurations", *PRICE]
    if not any(cell.text != ABSENT for row in rows for cell in row.cells[-len(PRICE) :]):  # records of older versions
        rows = [replace(row, cells=row.cells[: -len(PRICE)]) for row in rows]
        columns = columns[: -len(PRICE)]
    several = len(kept) > len(rows)
    sections = [("", rows)] if rows and several else []
    out = len(comparison.groups) - len(kept)
    left_out = (
        f"Left out: {out:,} of {len(comparison.groups):,} configurations, where the plain fine-tune reaches less than "
        f"{LEARNS:.0%} of its highest task accuracy."
    )
    caption = "Worst case of each defense"
    return Table(columns, sections, "Worst case", "Defense", caption, READING, left_out if out else "")


def _price(group: Group, plain: Group | None) -> list[Cell]:
    """What the defense needs; the time of its fine-tune as a multiple of the plain one's; memory."""

    def middle(values: Iterable[float | None]) -> float:
        """The median of what is known; 0: nothing is."""
        return median([value for value in values if value is not None] or [0.0])

    seconds, those = (middle(_seconds(run) for run in (one.runs if one else ())) for one in (group, plain))
    peak = middle(run.record.peak_bytes.get("gpu") or run.record.peak_bytes.get("host") for run in group.runs)
    texts = [
        ", ".join(group.runs[0].record.needs),
        f"{seconds / those:.2f}" if seconds and those else "",
        f"{peak / 1e9:.1f} GB" if peak else "",
    ]
    return [Cell(text or ABSENT) for text in texts]


def _seconds(run: RecordedRun) -> float | None:
    """Of the fine-tune, also where the run copied it; older records know only what the stage took."""
    taken = run.record.wall_seconds
    return taken.get("training", taken.get("finetune"))


def focus(comparison: Comparison) -> Comparison:
    """What is shown side by side and in full: all groups, or of more than `MANY` the worst case of each defense."""
    if len(comparison.groups) <= MANY:
        return comparison
    chosen = [found for groups in by_defense(comparison.groups).values() if (found := worst(groups))][:MANY]
    bases = tuple(base for base in comparison.bases if any(comparison.base_of(group) is base for group in chosen))
    return Comparison(bases, tuple(chosen), comparison.keys)
