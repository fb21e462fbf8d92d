"""A metric over two settings: one panel for each defense, all on one scale of colors, the values in the cells."""

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from secvec.metrics import METRICS
from secvec.report.axes import Axis, Facet, Sweep
from secvec.report.groups import Group
from secvec.report.style import GRID, INK, MUTED, Look, better, hover, panels_figure, settings, spoken
from secvec.report.worst import by_defense, worst

READABLE = 14  # columns whose values can be printed in the cells
CROWDED = 150  # cells from which on they are one surface, without titles
DARK, LIGHT = "#101418", "#fdfdfd"  # in cells, whose colors are the same on a dark page


def heatmap_figure(sweep: Sweep, facets: Sequence[Facet], name: str, defenses: Sequence[str]) -> Figure:
    """Metric `name` (a rate, so the scale is 0 to 1 everywhere): a row for each facet, with `defenses` side by side."""
    x, y = sweep.axes
    wide = max(4.6, 0.9 + 0.52 * min(len(x.values), READABLE + 6)) + 0.4
    high = max(1.6, 0.4 * min(len(y.values), 24)) + 1.2
    margin = 0.075 * max(len(y.text(value)) for value in y.values)
    shown = [(facet, defense) for facet in facets for defense in defenses]
    with settings():
        columns = max(len(defenses), 2)
        figure, panels = panels_figure(len(shown), wide + margin / len(defenses), high, columns)
        for number, (panel, (facet, defense)) in enumerate(zip(panels, shown, strict=True)):
            held = textwrap.fill(facet.title, 48) if len(facets) > 1 else ""
            panel.set_title("\n".join(filter(None, (textwrap.fill(defense, 40), held))))
            _cells(panel, sweep, by_defense(facet.groups).get(defense, []), name)
            panel.set_xlabel(x.key)
            panel.set_ylabel("" if number % columns else y.key)
        about = f"{METRICS[name].label}, {better(METRICS[name])}"
        about += f" · {facets[0].title}" if len(facets) == 1 and facets[0].title else ""
        figure.suptitle(textwrap.fill(about, 64), fontsize=10, color=MUTED)
    return figure


def _cells(panel: Axes, sweep: Sweep, groups: Sequence[Group], name: str) -> None:
    x, y = sweep.axes
    metric = METRICS[name]
    # Deep color: much of what is unwanted in orange, much of what is wanted in blue.
    colors: Any = colormaps["Oranges" if metric.better == "low" else "Blues"]
    at = {(sweep.value(group, x), sweep.value(group, y)): group for group in groups}
    grid = [[at.get((a, b)) for a in x.values] for b in y.values]
    means = [[e.mean if g and (e := g.estimate(name)) else math.nan for g in row] for row in grid]
    highest = worst(groups)
    crowded = len(x.values) * len(y.values) > CROWDED
    if crowded:
        # One surface on a hatched ground: that many cells apart would make a page that no phone opens.
        panel.add_artist(_cell(len(x.values) / 2 - 0.5, len(y.values) / 2 - 0.5, len(x.values), len(y.values)))
        shade = [[0.05 + 0.8 * mean for mean in row] for row in means]
        panel.pcolormesh(np.arange(len(x.values)), np.arange(len(y.values)), shade, cmap=colors, vmin=0, vmax=1)
    for row, column in np.ndindex(len(y.values), len(x.values)):
        group, mean = grid[row][column], means[row][column]
        ink = LIGHT if mean > 0.62 else DARK
        if group is highest and group is not None:
            panel.add_artist(_cell(column, row, 0.88, 0.88, hatch=None, edgecolor=ink, linewidth=1.8, zorder=4))
        if crowded:
            continue
        found = group.estimate(name) if group else None
        if group is None or found is None:
            place = f"{x.key}={x.text(x.values[column])}, {y.key}={y.text(y.values[row])}"
            panel.add_artist(hover(_cell(column, row, 1, 1), f"{place}: not measured"))
            continue
        patch = _cell(column, row, 1, 1, hatch=None, facecolor=colors(0.05 + 0.8 * mean), edgecolor="none")
        panel.add_artist(hover(patch, spoken(group, found, metric, group is highest)))
        if len(x.values) <= READABLE:
            panel.text(column, row, f"{mean:.2f}", ha="center", va="center", fontsize=9, color=ink)
    _frame(panel, x, y)
    elsewhere = [g for g in groups if not (sweep.value(g, x) and sweep.value(g, y))]
    for group in elsewhere[:1]:  # the defense has no such setting: one value for the whole panel
        if e := group.estimate(name):
            look: Look = {"ha": "center", "va": "center", "color": DARK, "backgroundcolor": LIGHT}
            panel.text(0.5, 0.5, f"{e.mean:.2f}\n(no such setting)", transform=panel.transAxes, **look)


def _cell(x: float, y: float, width: float, height: float, **look: Any) -> Rectangle:
    """A rectangle around a place; `look` replaces the hatching, which means not measured."""
    plain: Look = {"facecolor": "none", "edgecolor": GRID, "hatch": "////", "linewidth": 0}
    return Rectangle((x - width / 2, y - height / 2), width, height, **(plain | look))


def _frame(panel: Axes, x: Axis, y: Axis) -> None:
    panel.set_xlim(-0.5, len(x.values) - 0.5)
    panel.set_ylim(-0.5, len(y.values) - 0.5)
    if not y.numeric:
        panel.invert_yaxis()  # categories are read from the top, as in a matrix
    step = math.ceil(len(x.values) / 12) if x.numeric else 1
    texts = [x.text(value) for value in x.values]
    turned = 30 if max(map(len, texts)) > 6 else 0
    panel.set_xticks(range(0, len(texts), step), texts[::step], rotation=turned, ha="right" if turned else "center")
    step = math.ceil(len(y.values) / 16) if y.numeric else 1
    panel.set_yticks(range(0, len(y.values), step), [y.text(value) for value in y.values[::step]])
    panel.tick_params(labelcolor=INK)
    panel.spines[:].set_visible(False)
