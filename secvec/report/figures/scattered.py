"""A metric over a number, its configurations scattered as a search leaves them: points, and what else they had."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from secvec.metrics import METRICS
from secvec.report.axes import Facet, Sweep
from secvec.report.figures.lines import MARKERS
from secvec.report.figures.panels import facets_figure
from secvec.report.figures.points import log_axis, mark_point
from secvec.report.style import MUTED, SURFACE, direction, series_color, spoken
from secvec.report.worst import by_defense, worst

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW = 40  # points beside which there is room for text


def scattered_figure(sweep: Sweep, facets: Sequence[Facet], name: str) -> Figure:
    """Metric `name` (a rate), a panel for each of `facets`."""
    return facets_figure(partial(_draw, sweep, name), facets, 5.4 if len(facets) == 1 else 4.6, 3.7)


def _draw(sweep: Sweep, name: str, panel: Axes, facet: Facet) -> None:
    (axis,), shown = sweep.axes, len(facet.groups) <= FEW
    direction(panel, METRICS[name], facet.title)
    if axis.log:
        log_axis(panel)
    for index, defense in enumerate(sweep.defenses):
        groups = by_defense(facet.groups).get(defense, [])
        color, label, highest = series_color(index), defense, worst(groups)
        for group in groups:
            found, value = group.estimate(name), sweep.value(group, axis)
            if found is None or not value:
                continue
            x = axis.place(value)
            panel.plot(
                [x],
                [found.mean],
                MARKERS[index % len(MARKERS)],
                color=color,
                markersize=7,
                markeredgecolor=SURFACE,
                label=label,
                zorder=3,
            )
            label = "_"  # one entry in the legend
            mark_point(panel, x, found, color, spoken(group.label, found, METRICS[name]), group is highest)
            if shown:
                text = ", ".join(other.text(sweep.value(group, other)) for other in sweep.beside)
                panel.annotate(
                    text, (x, found.mean), (0, 8), textcoords="offset points", fontsize=8, color=MUTED, ha="center"
                )
    low, high = axis.place(axis.values[0]), axis.place(axis.values[-1])
    edge = (high / low) ** 0.05 if axis.log else (high - low) * 0.05
    panel.set_xlim((low / edge, high * edge) if axis.log else (low - edge, high + edge))
    panel.set_xlabel(axis.key + (f" (at the points: {', '.join(o.key for o in sweep.beside)})" if shown else ""))
    panel.set_ylim(-0.06, 1.14)
    panel.tick_params(length=0, which="both")
    panel.grid()
