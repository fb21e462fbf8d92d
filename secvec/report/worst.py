"""The worst case of each defense: a defense is as good as its configuration with the highest behavior rate."""

from collections.abc import Iterable

from secvec.metrics import METRICS
from secvec.report.groups import Comparison, Group
from secvec.report.tables import Cell, Row, Table, cell

MANY = 8
"""More configurations than this do not fit side by side."""
BESIDE = ("behavior_rate", "task_accuracy", "refusal_rate", "retained_accuracy", "coherence_rate")
READING = (
    "Of every defense the configuration with the highest behavior rate (of several, the one with the lowest task "
    "accuracy), and what the others reach at best and at worst. The highest of many measured rates is in part chance: "
    "it overstates a little, and a defense that was tried on more configurations had more chances to fail."
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


def worst_table(comparison: Comparison) -> Table:
    """One row for each defense: its worst configuration and that one's utility; empty without several configurations.

    The columns after the metrics give the range of the behavior rate over all configurations of the defense.
    """
    rows = []
    names = [name for name in BESIDE if any(group.estimate(name) for group in comparison.groups)]
    for defense, groups in by_defense(comparison.groups).items():
        found = worst(groups)
        if found is None:
            continue
        rates = [e.mean for group in groups if (e := group.estimate("behavior_rate"))]
        text = METRICS["behavior_rate"].text
        cells = [Cell(found.label.removeprefix(defense).lstrip(" ·") or "the only one")]
        cells += [cell(found.estimate(name), METRICS[name]) for name in names]
        cells.append(Cell(f"{text(min(rates))} to {text(max(rates))}", count=f"{len(rates)} configurations"))
        rows.append(Row(defense, cells))
    heads = [METRICS[name].title for name in names]
    several = len(comparison.groups) > len(rows)
    columns = ["Worst configuration", *heads, "Behavior rate, all configurations"]
    sections = [("", rows)] if rows and several else []
    return Table(columns, sections, "Worst case", "Defense", "Worst case of each defense", READING)


def focus(comparison: Comparison) -> Comparison:
    """What is shown side by side and in full: all groups, or of more than `MANY` the worst case of each defense."""
    if len(comparison.groups) <= MANY:
        return comparison
    chosen = [found for groups in by_defense(comparison.groups).values() if (found := worst(groups))][:MANY]
    scopes = {group.scope for group in chosen}
    bases = tuple(base for base in comparison.bases if base.scope in scopes)
    return Comparison(bases, tuple(chosen), comparison.keys)
