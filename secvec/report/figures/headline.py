"""Rates per group with every seed: the headline."""

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from secvec.metrics import METRICS
from secvec.report.groups import Comparison, Group
from secvec.report.style import BASE, INK, MUTED, SURFACE, direction, series_color, settings

HEADLINE = ("behavior_rate", "task_accuracy", "desired_rate")


def headline_names(comparison: Comparison) -> list[str]:
    """The metrics of `HEADLINE` that were measured, and always the behavior rate."""
    return [n for n in HEADLINE if n == "behavior_rate" or any(column.estimate(n) for column in comparison.columns)]


def headline_figure(comparison: Comparison, names: Sequence[str] | None = None) -> Figure:
    """Mean, 95 % interval and each seed per column; one panel for each metric in `names` (None: `headline_names`)."""
    names = headline_names(comparison) if names is None else names
    rows = comparison.columns
    colors = [BASE] * len(comparison.bases) + [series_color(i) for i in range(len(comparison.groups))]
    with settings():
        size = 4.9 * len(names), 0.9 + 0.62 * max(len(rows), 1)  # inches
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.08))
        axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axis, name in zip(axes, names, strict=True):
            _rates(axis, rows, colors, name)
    return figure


def _rates(axis: Axes, rows: Sequence[Group], colors: Sequence[str], name: str) -> None:
    metric = METRICS[name]
    direction(axis, metric, "")
    axis.set_xlim(-0.03, 1.03)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    axis.set_yticks(range(len(rows)), [textwrap.fill(group.label, 20) for group in rows])
    axis.grid(axis="x")
    axis.spines[["left", "bottom"]].set_visible(False)
    for y, (group, color) in enumerate(zip(rows, colors, strict=True)):
        found = group.estimate(name)
        if found is None:
            axis.text(0.0, y, "not measured", color=MUTED, va="center", fontsize=9.5)
            continue
        if group.phase == "base" and sum(row.phase == "base" for row in rows) == 1:
            axis.axvline(found.mean, color=BASE, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        if found.kind != "none":
            axis.plot([found.low, found.high], [y, y], color=color, linewidth=2.2, solid_capstyle="butt", zorder=2)
            for end in (found.low, found.high):
                axis.plot([end, end], [y - 0.1, y + 0.1], color=color, linewidth=2.2, zorder=2)
        axis.scatter([found.mean], [y], s=78, color=color, edgecolor=SURFACE, linewidth=1.2, zorder=4)
        seeds = [value for _, value in found.by_seed]
        axis.scatter(seeds, [y + 0.27] * len(seeds), s=20, color=color, alpha=0.75, linewidth=0, zorder=3)
        # Kept inside the panel at both ends of the scale.
        side = "left" if found.mean < 0.1 else "right" if found.mean > 0.94 else "center"
        shift = {"left": 0.012, "right": -0.012}.get(side, 0.0)
        axis.text(found.mean + shift, y - 0.2, metric.text(found.mean), color=INK, ha=side, va="bottom", fontsize=9.5)
