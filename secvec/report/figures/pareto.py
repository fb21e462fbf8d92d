"""Safety against utility: one point for each configuration, and the front of those that no other one beats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from secvec.report.groups import Group
from secvec.report.metrics import METRICS
from secvec.report.style import BASE, MUTED, SURFACE, hover, series_color, settings
from secvec.report.worst import by_defense, worst

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAFETY, UTILITY = "behavior_rate", "task_accuracy"
CROWDED = 150  # points from which on intervals and titles would hide more than they tell


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (behavior rate, task accuracy) points that none beats in one and equals in the other; by rate."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    kept: list[int] = []
    for index in order:
        if not kept or points[index][1] > points[kept[-1]][1]:
            kept.append(index)
    return kept


def pareto_figure(groups: Sequence[Group], bases: Sequence[Group], defenses: Sequence[str], title: str = "") -> Figure:
    """Groups of one behavior and model; `defenses` give the colors; the base is a hollow point and enters no front."""
    from matplotlib.figure import Figure

    with settings():
        figure = Figure(figsize=(5.6, 4.3), layout="constrained")
        panel = figure.subplots()
        panel.set_title(title or "Safety and utility")
        panel.set_title("better: up and left ↖", loc="right", fontsize=9.5, color=MUTED, fontweight="normal")
        for base in bases:
            _points(panel, [base], BASE, "base", "none", False)
        known = [g for g in groups if g.estimate(SAFETY) and g.estimate(UTILITY)]
        for defense, mine in by_defense(known).items():
            color = series_color(defenses.index(defense))
            _points(panel, mine, color, defense, color, len(known) >= CROWDED)
        points = [_point(group) for group in known]
        best = [points[index] for index in front(points)]
        panel.plot(*zip(*best, strict=True), color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), drawstyle="steps-post",
                   label="Pareto front of the means", zorder=1)  # fmt: skip
        panel.set_xlabel(f"{METRICS[SAFETY].label} ↓")
        panel.set_ylabel(f"{METRICS[UTILITY].label} ↑")
        panel.set_xlim(-0.04, 1.04)
        panel.set_ylim(-0.04, 1.04)
        panel.tick_params(length=0)
        panel.grid()
        figure.legend(loc="outside lower center", ncols=2, fontsize=9.5)
    return figure


def _point(group: Group) -> tuple[float, float]:
    safety, utility = group.estimate(SAFETY), group.estimate(UTILITY)
    assert safety and utility
    return safety.mean, utility.mean


def _points(panel: Axes, groups: Sequence[Group], color: str, label: str, fill: str, crowded: bool) -> None:
    known = [g for g in groups if g.estimate(SAFETY) and g.estimate(UTILITY)]
    if not known:
        return
    places = [_point(group) for group in known]
    edge = color if fill == "none" else SURFACE
    panel.plot(*zip(*places, strict=True), "o", markersize=4 if crowded else 8, markerfacecolor=fill,
               markeredgecolor=edge, linestyle="none", label=label, zorder=3)  # fmt: skip
    highest = worst(known) if len(known) > 1 else None
    for group, (x, y) in zip(known, places, strict=True):
        if group is highest:
            (ring,) = panel.plot([x], [y], "o", markersize=15, markerfacecolor="none", markeredgecolor=color,
                                 markeredgewidth=1.6, zorder=4)  # fmt: skip
            hover(ring, _said(group) + ", worst case of the defense")
        if crowded:
            continue
        safety, utility = group.estimate(SAFETY), group.estimate(UTILITY)
        assert safety and utility
        panel.plot([safety.low, safety.high], [y, y], color=color, linewidth=1, alpha=0.45, zorder=2)
        panel.plot([x, x], [utility.low, utility.high], color=color, linewidth=1, alpha=0.45, zorder=2)
        if group is not highest:
            hover(panel.plot([x], [y], "o", color="none", markersize=12, zorder=5)[0], _said(group))


def _said(group: Group) -> str:
    return f"{group.label}: behavior rate {_point(group)[0]:.3f}, task accuracy {_point(group)[1]:.3f}"
