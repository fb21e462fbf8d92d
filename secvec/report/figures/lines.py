"""A metric over one numeric setting: a line for each defense with the band of its intervals."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from secvec.metrics import METRICS
from secvec.report.axes import Facet, Sweep, ticks
from secvec.report.figures.panels import facets_figure
from secvec.report.figures.points import mark_point
from secvec.report.groups import Group
from secvec.report.style import SURFACE, direction, hover, series_color, spoken
from secvec.report.worst import by_defense, worst

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = "os^Dv<>P"


def lines_figure(sweep: Sweep, facets: Sequence[Facet], name: str, phase: str = "after") -> Figure:
    """Metric `name` in `phase` over the axis, a panel for each of `facets`."""
    return facets_figure(partial(_draw, sweep, name, phase), facets, 5.4 if len(facets) == 1 else 4.2, 3.7)


def _draw(sweep: Sweep, name: str, phase: str, panel: Axes, facet: Facet) -> None:
    """A line for each defense; one with a single configuration is level and dashed."""
    (axis,) = sweep.axes
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
        panel.set_ylim(-0.06, 1.06)  # a ring at 0 or 1 is whole
    panel.tick_params(length=0)
    panel.grid(axis="y")
    panel.spines["left"].set_visible(False)


def _line(
    panel: Axes, points: list[tuple[float, Group]], of: tuple[str, str], color: str, marker: str, defense: str
) -> None:
    found = [(x, group, e) for x, group in points if (e := group.estimate(*of))]
    if not found:
        return
    places = [x for x, _, _ in found]
    low, high = [e.low for _, _, e in found], [e.high for _, _, e in found]
    panel.fill_between(places, low, high, color=color, alpha=0.16, linewidth=0, zorder=1)
    panel.plot(
        places,
        [e.mean for _, _, e in found],
        color=color,
        linewidth=2,
        marker=marker,
        markersize=6.5,
        markeredgecolor=SURFACE,
        label=defense,
        zorder=3,
    )
    highest = worst(group for _, group, _ in found)
    for x, group, e in found:
        # The band shows no interval where there is one point, and is no measurement between points.
        mark_point(panel, x, e, color, spoken(group.label, e, METRICS[of[0]]), group is highest)


def _level(panel: Axes, group: Group, of: tuple[str, str], color: str, label: str) -> None:
    e = group.estimate(*of)
    if e is None:
        return
    panel.axhspan(e.low, e.high, color=color, alpha=0.1, linewidth=0, zorder=1)
    hover(
        panel.axhline(e.mean, color=color, linewidth=1.6, linestyle=(0, (4, 3)), label=label, zorder=2),
        spoken(group.label, e, METRICS[of[0]]),
    )
