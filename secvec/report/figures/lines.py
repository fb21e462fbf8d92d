"""A metric over one numeric setting: a line for each defense with the band of its intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secvec.report.axes import Facet, Sweep, ticks
from secvec.report.groups import Group
from secvec.report.metrics import METRICS
from secvec.report.style import SURFACE, direction, hover, series_color, settings, spoken
from secvec.report.worst import by_defense, worst

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^Dv<>P"


def lines_figure(sweep: Sweep, facet: Facet, name: str, phase: str = "after") -> Figure:
    """Metric `name` in `phase` over the axis; a defense with a single configuration is a level dashed line."""
    from matplotlib.figure import Figure

    (axis,) = sweep.axes
    with settings():
        figure = Figure(figsize=(5.4, 3.7), layout="constrained")
        panel = figure.subplots()
        held = "vector on" if phase == "active" else ""
        direction(panel, METRICS[name], ", ".join(filter(None, (held, facet.title))))
        for index, defense in enumerate(sweep.defenses):
            mine = by_defense(facet.groups).get(defense, [])
            placed = [group for group in mine if sweep.value(group, axis)]
            color, marker = series_color(index), MARKERS[index % len(MARKERS)]
            if len(mine) == 1 and len(axis.values) > 1:
                value = sweep.value(mine[0], axis)
                where = f"only at {axis.text(value)}" if value else f"no {axis.key}"
                _level(panel, mine[0], (name, phase), color, f"{defense} ({where})")
            elif placed:
                placed.sort(key=lambda group: axis.place(sweep.value(group, axis)))
                points = [(axis.place(sweep.value(group, axis)), group) for group in placed]
                _line(panel, points, (name, phase), color, marker, defense)
        if axis.log:
            panel.set_xscale("log")
        panel.set_xticks(*ticks(axis))
        panel.minorticks_off()
        panel.set_xlabel(axis.key)
        if METRICS[name].bounds == (0, 1):
            panel.set_ylim(-0.03, 1.03)
        panel.tick_params(length=0)
        panel.grid(axis="y")
        panel.spines["left"].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2, fontsize=9.5)
    return figure


def _line(
    panel: Axes, points: list[tuple[float, Group]], of: tuple[str, str], color: str, marker: str, defense: str
) -> None:
    found = [(x, group, e) for x, group in points if (e := group.estimate(*of))]
    if not found:
        return
    places = [x for x, _, _ in found]
    low, high = [e.low for _, _, e in found], [e.high for _, _, e in found]
    panel.fill_between(places, low, high, color=color, alpha=0.16, linewidth=0, zorder=1)
    panel.plot(places, [e.mean for _, _, e in found], color=color, linewidth=2, marker=marker, markersize=6.5,
               markeredgecolor=SURFACE, label=defense, zorder=3)  # fmt: skip
    highest = worst(group for _, group, _ in found)
    for x, group, e in found:
        # A band without width (one point) or between points says nothing of the points themselves.
        panel.plot([x, x], [e.low, e.high], color=color, linewidth=1.2, alpha=0.7, zorder=2)
        (dot,) = panel.plot([x], [e.mean], "o", color="none", markersize=13, zorder=4,
                            markeredgecolor=color if group is highest else "none")  # fmt: skip
        hover(dot, spoken(group.label, e, METRICS[of[0]], "worst case in this panel" * (group is highest)))


def _level(panel: Axes, group: Group, of: tuple[str, str], color: str, label: str) -> None:
    e = group.estimate(*of)
    if e is None:
        return
    panel.axhspan(e.low, e.high, color=color, alpha=0.1, linewidth=0, zorder=1)
    hover(panel.axhline(e.mean, color=color, linewidth=1.6, linestyle=(0, (4, 3)), label=label, zorder=2),
          spoken(group.label, e, METRICS[of[0]]))  # fmt: skip
