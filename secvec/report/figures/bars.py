"""A metric over the categories of one setting: bars grouped by category, one for each defense."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from secvec.metrics import METRICS
from secvec.report.axes import Facet, Sweep
from secvec.report.figures.panels import facets_figure
from secvec.report.style import INK, direction, hover, series_color, spoken
from secvec.report.worst import by_defense, worst

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def bars_figure(sweep: Sweep, facets: Sequence[Facet], name: str) -> Figure:
    """Metric `name` (a rate), a panel for each of `facets`."""
    height = 1.3 + len(sweep.axes[0].values) * (0.2 + 0.24 * len(sweep.defenses))
    return facets_figure(partial(_draw, sweep, name), facets, 5.4, height)


def _draw(sweep: Sweep, name: str, panel: Axes, facet: Facet) -> None:
    """Horizontal bars, so that long names of categories can be read, with intervals."""
    (axis,), defenses = sweep.axes, sweep.defenses
    thick = 0.8 / len(defenses)
    direction(panel, METRICS[name], facet.title)
    for index, defense in enumerate(defenses):
        groups = by_defense(facet.groups).get(defense, [])
        highest, color, label = worst(groups), series_color(index), defense
        for group in groups:
            found, value = group.estimate(name), sweep.value(group, axis)
            if found is None or not value:
                continue
            y = axis.place(value) + (index - (len(defenses) - 1) / 2) * thick
            (bar,) = panel.barh([y], [found.mean], thick * 0.86, color=color, label=label)
            label = "_"  # one entry in the legend
            hover(bar, spoken(group.label, found, METRICS[name], "worst case in this panel" * (group is highest)))
            panel.plot([found.low, found.high], [y, y], color=INK, linewidth=1.1)
            end = max(found.high, found.mean) + 0.015
            panel.text(
                end,
                y,
                f"{found.mean:.2f}" + " worst" * (group is highest and len(groups) > 1),
                va="center",
                fontsize=8.5,
                color=INK,
            )
    panel.set_ylim(len(axis.values) - 0.45, -0.55)
    panel.set_yticks(range(len(axis.values)), [axis.text(value) for value in axis.values])
    panel.set_ylabel(axis.key)
    panel.set_xlim(0, 1.16)
    panel.set_xticks([0, 0.25, 0.5, 0.75, 1])
    panel.tick_params(length=0)
    panel.grid(axis="x")
    panel.spines[["left", "bottom"]].set_visible(False)
