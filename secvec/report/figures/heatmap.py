"""A metric over two settings: one panel for each defense, all on one scale of colors, the values in the cells."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from secvec.report.axes import Axis, Facet, Sweep
from secvec.report.groups import Group
from secvec.report.metrics import METRICS
from secvec.report.style import GRID, INK, MUTED, better, hover, settings, spoken
from secvec.report.worst import by_defense, worst

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

READABLE = 14  # columns whose values can be printed in the cells
DARK, LIGHT = "#101418", "#fdfdfd"  # in cells, whose colors are the same on a dark page


def heatmap_figure(sweep: Sweep, facet: Facet, name: str, defenses: Sequence[str]) -> Figure:
    """Metric `name` (a rate, so the scale is 0 to 1 everywhere) of `defenses` side by side."""
    from matplotlib.figure import Figure

    x, y = sweep.axes
    wide = max(4.6, 0.9 + 0.52 * min(len(x.values), READABLE + 6))
    high = max(1.6, 0.4 * min(len(y.values), 24)) + 1.2
    margin = 0.075 * max(len(y.text(value)) for value in y.values)
    with settings():
        figure = Figure(figsize=((wide + 0.4) * len(defenses) + margin, high), layout="constrained")
        panels = figure.subplots(1, len(defenses), sharey=True, squeeze=False)[0]
        for panel, defense in zip(panels, defenses, strict=True):
            groups = by_defense(facet.groups).get(defense, [])
            panel.set_title(textwrap.fill(defense, 40))
            _cells(panel, sweep, groups, name)
            panel.set_xlabel(x.key)
        panels[0].set_ylabel(y.key)
        about = f"{METRICS[name].label}, {better(METRICS[name])}" + f" · {facet.title}" * bool(facet.title)
        figure.suptitle(textwrap.fill(about, 64), fontsize=10, color=MUTED)
    return figure


def _cells(panel: Axes, sweep: Sweep, groups: Sequence[Group], name: str) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    # Not add_patch: it works out the limits of the data anew for each of many cells, and they are known.
    x, y = sweep.axes
    metric, highest = METRICS[name], worst(groups)
    # Deep color: much of what is unwanted in orange, much of what is wanted in blue.
    colors: Any = colormaps["Oranges" if metric.better == "low" else "Blues"]
    at = {(sweep.value(group, x), sweep.value(group, y)): group for group in groups}
    for row, b in enumerate(y.values):
        for column, a in enumerate(x.values):
            group = at.get((a, b))
            found = group.estimate(name) if group else None
            corner = (column - 0.5, row - 0.5)
            if group is None or found is None:
                blank = Rectangle(corner, 1, 1, facecolor="none", edgecolor=GRID, hatch="////", linewidth=0)
                panel.add_artist(hover(blank, f"{x.key}={x.text(a)}, {y.key}={y.text(b)}: not measured"))
                continue
            patch = Rectangle(corner, 1, 1, facecolor=colors(0.05 + 0.8 * found.mean), edgecolor="none")
            said = "worst case in this panel" if group is highest else ""
            panel.add_artist(hover(patch, spoken(group.label, found, metric, said)))
            if len(x.values) <= READABLE:
                panel.text(column, row, f"{found.mean:.2f}", ha="center", va="center", fontsize=9,
                           color=LIGHT if found.mean > 0.62 else DARK)  # fmt: skip
            if group is highest:
                panel.add_artist(Rectangle((column - 0.44, row - 0.44), 0.88, 0.88, fill=False, linewidth=1.8,
                                          edgecolor=LIGHT if found.mean > 0.62 else DARK, zorder=4))  # fmt: skip
    _frame(panel, x, y)
    elsewhere = [g for g in groups if not (sweep.value(g, x) and sweep.value(g, y))]
    for group in elsewhere[:1]:  # the defense has no such setting: one value for the whole panel
        if e := group.estimate(name):
            panel.text(0.5, 0.5, f"{e.mean:.2f}\n(at no such setting)", transform=panel.transAxes, ha="center",
                       va="center", color=INK, backgroundcolor="#ffffff")  # fmt: skip


def _frame(panel: Axes, x: Axis, y: Axis) -> None:
    panel.set_xlim(-0.5, len(x.values) - 0.5)
    panel.set_ylim(-0.5, len(y.values) - 0.5)
    if not y.numeric:
        panel.invert_yaxis()  # categories are read from the top, as in a matrix
    step = max(1, len(x.values) // 12) if x.numeric else 1
    texts = [x.text(value) for value in x.values]
    turned = 30 if max(map(len, texts)) > 6 else 0
    panel.set_xticks(range(0, len(texts), step), texts[::step], rotation=turned, ha="right" if turned else "center")
    step = max(1, len(y.values) // 16) if y.numeric else 1
    panel.set_yticks(range(0, len(y.values), step), [y.text(value) for value in y.values[::step]])
    panel.tick_params(length=0, labelcolor=INK)
    panel.spines[:].set_visible(False)
