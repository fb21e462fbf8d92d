"""A metric over one setting, a panel for each facet: lines over a number, the points of a search, or bars."""

from collections.abc import Iterator, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from secvec.metrics import METRICS, Metric
from secvec.report import style
from secvec.report.axes import Facet, Sweep, ticks
from secvec.report.estimate import Estimate
from secvec.report.groups import Group
from secvec.report.style import Look
from secvec.report.worst import by_defense, worst

MARKERS = "os^Dv<>P"
FEW = 40  # points beside which there is room for text
Point = tuple[float, Group, Estimate]
"""The group's place on the axis, the group, and its estimate."""


def lines_figure(sweep: Sweep, facets: Sequence[Facet], name: str, phase: str = "after") -> Figure:
    """Metric `name` in `phase` over a number: a line for each defense with the band of its intervals."""
    return style.facets_figure(partial(_lines, sweep, name, phase), facets, 5.4 if len(facets) == 1 else 4.2, 3.7)


def points_figure(sweep: Sweep, facets: Sequence[Facet], name: str) -> Figure:
    """Metric `name` (a rate) over a number, as a search leaves it: points, and what else their configurations had."""
    return style.facets_figure(partial(_points, sweep, name), facets, 5.4 if len(facets) == 1 else 4.6, 3.7)


def bars_figure(sweep: Sweep, facets: Sequence[Facet], name: str) -> Figure:
    """Metric `name` (a rate) over categories: horizontal bars, so that long names can be read, one for each defense."""
    height = 1.3 + len(sweep.axes[0].values) * (0.2 + 0.24 * len(sweep.defenses))
    return style.facets_figure(partial(_bars, sweep, name), facets, 5.4, height)


def _series(
    sweep: Sweep, facet: Facet, name: str, phase: str = "after"
) -> Iterator[tuple[int, str, list[Group], list[Point]]]:
    """Of each defense: its number, its name, its groups, and those of them that have a place and were measured."""
    (axis,) = sweep.axes
    for number, defense in enumerate(sweep.defenses):
        groups = by_defense(facet.groups).get(defense, [])
        placed = [(axis.place(value), group) for group in groups if (value := sweep.value(group, axis))]
        yield number, defense, groups, [(x, group, e) for x, group in placed if (e := group.estimate(name, phase))]


def _mark(panel: Axes, point: Point, metric: Metric, color: str, is_worst: bool) -> None:
    """The interval of a point, a ring where it is the worst, and a text on hover."""
    x, group, e = point
    panel.plot([x, x], [e.low, e.high], color=color, linewidth=1.2, alpha=0.7, zorder=2)
    edge = color if is_worst else "none"
    (ring,) = panel.plot([x], [e.mean], "o", color="none", markersize=13, zorder=4, markeredgecolor=edge)
    style.hover(ring, style.spoken(group, e, metric, is_worst))


def _lines(sweep: Sweep, name: str, phase: str, panel: Axes, facet: Facet) -> None:
    """A line for each defense; one with a single configuration is level and dashed."""
    (axis,), metric = sweep.axes, METRICS[name]
    held = "vector on" if phase == "active" else ""
    style.direction(panel, metric, ", ".join(filter(None, (held, facet.title))))
    for number, defense, groups, points in _series(sweep, facet, name, phase):
        color = style.series_color(number)
        if len(groups) == 1 and len(axis.values) > 1:
            value = sweep.value(groups[0], axis)
            where = f"only at {axis.text(value)}" if value else f"no {axis.key}"
            if e := groups[0].estimate(name, phase):
                panel.axhspan(e.low, e.high, color=color, alpha=0.1, linewidth=0, zorder=1)
                look: Look = {"linewidth": 1.6, "linestyle": (0, (4, 3)), "label": f"{defense} ({where})"}
                style.hover(panel.axhline(e.mean, color=color, zorder=2, **look), style.spoken(groups[0], e, metric))
        elif points:
            points.sort(key=lambda point: point[0])
            places, means = [x for x, _, _ in points], [e.mean for _, _, e in points]
            low, high = [e.low for _, _, e in points], [e.high for _, _, e in points]
            panel.fill_between(places, low, high, color=color, alpha=0.16, linewidth=0, zorder=1)
            look = {"marker": MARKERS[number % len(MARKERS)], "markersize": 6.5, "markeredgecolor": style.SURFACE}
            panel.plot(places, means, color=color, linewidth=2, label=defense, zorder=3, **look)
            highest = worst(group for _, group, _ in points)
            for point in points:  # the band shows no interval of a single point, and is no measurement between points
                _mark(panel, point, metric, color, point[1] is highest)
    if axis.log:
        panel.set_xscale("log")
    panel.set_xticks(*ticks(axis))
    panel.minorticks_off()
    panel.set_xlabel(axis.key)
    if metric.bounds == (0, 1):
        panel.set_ylim(-0.06, 1.06)  # a ring at 0 or 1 is whole
    panel.grid(axis="y")
    panel.spines["left"].set_visible(False)


def _points(sweep: Sweep, name: str, panel: Axes, facet: Facet) -> None:
    (axis,), shown, metric = sweep.axes, len(facet.groups) <= FEW, METRICS[name]
    style.direction(panel, metric, facet.title)
    if axis.log:
        style.log_axis(panel)
    for number, label, groups, points in _series(sweep, facet, name):
        color, highest = style.series_color(number), worst(groups)
        look: Look = {"marker": MARKERS[number % len(MARKERS)], "markersize": 7, "markeredgecolor": style.SURFACE}
        for x, group, e in points:
            panel.plot([x], [e.mean], linestyle="none", color=color, label=label, zorder=3, **look)
            label = "_"  # one entry in the legend
            _mark(panel, (x, group, e), metric, color, group is highest)
            if shown:
                text = ", ".join(other.text(sweep.value(group, other)) for other in sweep.beside)
                place: Look = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
                panel.annotate(text, (x, e.mean), fontsize=8, color=style.MUTED, **place)
    low, high = axis.place(axis.values[0]), axis.place(axis.values[-1])
    edge = (high / low) ** 0.05 if axis.log else (high - low) * 0.05
    panel.set_xlim((low / edge, high * edge) if axis.log else (low - edge, high + edge))
    panel.set_xlabel(axis.key + (f" (at the points: {', '.join(o.key for o in sweep.beside)})" if shown else ""))
    panel.set_ylim(-0.06, 1.14)
    panel.grid()


def _bars(sweep: Sweep, name: str, panel: Axes, facet: Facet) -> None:
    (axis,), count, metric = sweep.axes, len(sweep.defenses), METRICS[name]
    thick = 0.8 / count
    style.direction(panel, metric, facet.title)
    for number, label, groups, points in _series(sweep, facet, name):
        highest = worst(groups)
        for place, group, e in points:
            y, is_worst = place + (number - (count - 1) / 2) * thick, group is highest
            (bar,) = panel.barh([y], [e.mean], thick * 0.86, color=style.series_color(number), label=label)
            label = "_"  # one entry in the legend
            style.hover(bar, style.spoken(group, e, metric, is_worst))
            panel.plot([e.low, e.high], [y, y], color=style.INK, linewidth=1.1)
            text = f"{e.mean:.2f}" + " worst" * (is_worst and len(groups) > 1)
            panel.text(max(e.high, e.mean) + 0.015, y, text, va="center", fontsize=8.5, color=style.INK)
    panel.set_ylim(len(axis.values) - 0.45, -0.55)
    panel.set_yticks(range(len(axis.values)), [axis.text(value) for value in axis.values])
    panel.set_ylabel(axis.key)
    panel.set_xlim(0, 1.16)
    panel.set_xticks([0, 0.25, 0.5, 0.75, 1])
    panel.grid(axis="x")
    panel.spines[["left", "bottom"]].set_visible(False)
