"""Configurations as points of a plane: safety against utility, and the behavior rate over properties of the vector."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from secvec.metrics import METRICS
from secvec.report import style
from secvec.report.estimate import Estimate
from secvec.report.groups import Group
from secvec.report.style import Look
from secvec.report.worst import by_defense, worst

SAFETY, UTILITY = "behavior_rate", "task_accuracy"
MEASURES = {  # metric -> phase it is measured in, and what the axis says
    "behavior_loss": ("vector_on", "Vector's loss on held-out undesired samples, nats per token"),
    "deactivation_gap": ("after", "Deactivation gap: task accuracy, vector on minus off"),
}
CROWDED = 150  # points from which on intervals and titles would hide each other
Point = tuple[Estimate, Estimate, str]
"""x, y, and the text on hover."""


def pareto_figure(groups: Sequence[Group], bases: Sequence[Group], defenses: Sequence[str], title: str = "") -> Figure:
    """`groups` of one behavior and model have both measures; `defenses` give the colors; bases are in no front."""
    with style.settings():
        figure, (panel,) = style.panels_figure(1, 5.6, 4.3)
        panel.set_title(title or "Safety and utility")
        panel.set_title("better: up and left ↖", loc="right", fontsize=9.5, color=style.MUTED, fontweight="normal")
        _plot(panel, _points(bases, SAFETY, UTILITY), style.BASE, "base", hollow=True)
        for defense, mine in by_defense(groups).items():
            color, points = style.series_color(defenses.index(defense)), _points(mine, SAFETY, UTILITY)
            highest = worst(mine) if len(mine) > 1 else None
            if highest:
                x, y, text = points[mine.index(highest)]
                points[mine.index(highest)] = x, y, f"{text}, worst case of the defense"
            _plot(panel, points, color, defense, len(groups) >= CROWDED)
            if highest:
                ring: Look = {"markerfacecolor": "none", "markeredgecolor": color, "markeredgewidth": 1.6}
                panel.plot([x.mean], [y.mean], "o", markersize=15, zorder=4, **ring)
        places = [(x.mean, y.mean) for x, y, _ in _points(groups, SAFETY, UTILITY)]
        best = zip(*(places[index] for index in front(places)), strict=True)
        dashed: Look = {"linewidth": 1.2, "linestyle": (0, (4, 3)), "drawstyle": "steps-post"}
        panel.plot(*best, color=style.MUTED, label="Pareto front of the means", zorder=1, **dashed)
        panel.set_xlabel(f"{METRICS[SAFETY].label} ↓")
        panel.set_ylabel(f"{METRICS[UTILITY].label} ↑")
        panel.set_xlim(-0.06, 1.06)
        panel.set_ylim(-0.06, 1.06)
        panel.grid()
        style.legend(figure, [panel])
    return figure


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (behavior rate, task accuracy) points on the Pareto front, by rate."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    kept: list[int] = []
    for index in order:
        if not kept or points[index][1] > points[kept[-1]][1]:
            kept.append(index)
    return kept


def measured(group: Group, name: str) -> bool:
    """Whether the group has a place in the `protection_figure` over metric `name`."""
    return bool(group.estimate(name, MEASURES[name][0]) and group.estimate(SAFETY))


def protection_figure(groups: Sequence[Group], name: str, defenses: Sequence[str], title: str = "") -> Figure:
    """Behavior rate over metric `name` of `MEASURES`; `groups` are all `measured`, `defenses` give the colors."""
    phase, label = MEASURES[name]
    with style.settings():
        figure, (panel,) = style.panels_figure(1, 5.6, 3.9)
        style.direction(panel, METRICS[SAFETY], title)
        for defense, mine in by_defense(groups).items():
            points = _points(mine, name, SAFETY, phase)
            _plot(panel, points, style.series_color(defenses.index(defense)), defense, len(groups) >= CROWDED)
        places = [x.mean for x, _, _ in _points(groups, name, SAFETY, phase)]
        if min(places) > 0 and max(places) / min(places) >= 8:
            style.log_axis(panel)
        panel.set_xlabel(label)
        panel.set_ylim(-0.06, 1.06)
        panel.grid()
        style.legend(figure, [panel])
    return figure


def _points(groups: Sequence[Group], x: str, y: str, phase: str | None = None) -> list[Point]:
    """The groups that have metric `x` in `phase` (None: the group's own) and metric `y`."""
    found = []
    for group in groups:
        across, up = group.estimate(x, phase), group.estimate(y)
        if across and up:
            one, other = (f"{METRICS[n].label.lower()} {METRICS[n].text(e.mean)}" for n, e in ((x, across), (y, up)))
            found.append((across, up, f"{group.label}: {one}, {other}"))
    return found


def _plot(
    panel: Axes, points: Sequence[Point], color: str, label: str, crowded: bool = False, hollow: bool = False
) -> None:
    """Draws `points` with the intervals of both coordinates; `label` is their one entry in the legend."""
    if not points:
        return
    places = [x.mean for x, _, _ in points], [y.mean for _, y, _ in points]
    look: Look = {"markerfacecolor": "none" if hollow else color, "markeredgecolor": color if hollow else style.SURFACE}
    panel.plot(*places, "o", markersize=4 if crowded else 8, label=label, zorder=3, **look)
    for x, y, text in () if crowded else points:
        panel.plot([x.low, x.high], [y.mean, y.mean], color=color, linewidth=1, alpha=0.45, zorder=2)
        panel.plot([x.mean, x.mean], [y.low, y.high], color=color, linewidth=1, alpha=0.45, zorder=2)
        style.hover(panel.plot([x.mean], [y.mean], "o", color="none", markersize=12, zorder=5)[0], text)
