"""Safety against utility: one point for each configuration, and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from secvec.metrics import METRICS
from secvec.report.figures.panels import legend, panels_figure
from secvec.report.figures.points import CROWDED, plot_points, points_of
from secvec.report.groups import Group
from secvec.report.style import BASE, MUTED, series_color, settings
from secvec.report.worst import by_defense, worst

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAFETY, UTILITY = "behavior_rate", "task_accuracy"


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (behavior rate, task accuracy) points on the Pareto front, by rate."""
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    kept: list[int] = []
    for index in order:
        if not kept or points[index][1] > points[kept[-1]][1]:
            kept.append(index)
    return kept


def pareto_figure(groups: Sequence[Group], bases: Sequence[Group], defenses: Sequence[str], title: str = "") -> Figure:
    """`groups` of one behavior and model have both measures; `defenses` give the colors; bases are in no front."""
    with settings():
        figure, (panel,) = panels_figure(1, 5.6, 4.3)
        panel.set_title(title or "Safety and utility")
        panel.set_title("better: up and left ↖", loc="right", fontsize=9.5, color=MUTED, fontweight="normal")
        plot_points(panel, points_of(bases, SAFETY, UTILITY), BASE, "base", hollow=True)
        for defense, mine in by_defense(groups).items():
            color, points = series_color(defenses.index(defense)), points_of(mine, SAFETY, UTILITY)
            highest = worst(mine) if len(mine) > 1 else None
            if highest:
                x, y, text = points[mine.index(highest)]
                points[mine.index(highest)] = x, y, f"{text}, worst case of the defense"
            plot_points(panel, points, color, defense, len(groups) >= CROWDED)
            if highest:
                panel.plot(
                    [x.mean],
                    [y.mean],
                    "o",
                    markersize=15,
                    markerfacecolor="none",
                    markeredgecolor=color,
                    markeredgewidth=1.6,
                    zorder=4,
                )
        places = [(x.mean, y.mean) for x, y, _ in points_of(groups, SAFETY, UTILITY)]
        best = [places[index] for index in front(places)]
        panel.plot(
            *zip(*best, strict=True),
            color=MUTED,
            linewidth=1.2,
            linestyle=(0, (4, 3)),
            drawstyle="steps-post",
            label="Pareto front of the means",
            zorder=1,
        )
        panel.set_xlabel(f"{METRICS[SAFETY].label} ↓")
        panel.set_ylabel(f"{METRICS[UTILITY].label} ↑")
        panel.set_xlim(-0.06, 1.06)
        panel.set_ylim(-0.06, 1.06)
        panel.tick_params(length=0)
        panel.grid()
        legend(figure, [panel])
    return figure
