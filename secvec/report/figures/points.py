"""Groups as points of a plane, with the intervals of both coordinates and a text on hover."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from secvec.metrics import METRICS
from secvec.report.estimate import Estimate
from secvec.report.groups import Group
from secvec.report.style import SURFACE, hover

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[Estimate, Estimate, str]
"""x, y, and the text on hover."""
CROWDED = 150  # points from which on intervals and titles would hide each other


def points_of(groups: Sequence[Group], x: str, y: str, phase: str | None = None) -> list[Point]:
    """The groups that have metric `x` in `phase` (None: the group's own) and metric `y`."""
    found = []
    for group in groups:
        across, up = group.estimate(x, phase), group.estimate(y)
        if across and up:
            one, other = (f"{METRICS[n].label.lower()} {METRICS[n].text(e.mean)}" for n, e in ((x, across), (y, up)))
            found.append((across, up, f"{group.label}: {one}, {other}"))
    return found


def log_axis(panel: Axes) -> None:
    """Makes x logarithmic, with plain numbers at its ticks: matplotlib's own are formulas, which are switched off."""
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter("")


def mark_point(panel: Axes, x: float, y: Estimate, color: str, text: str, worst: bool) -> None:
    """The interval of an estimate at `x`, a ring where it is the worst, and a text on hover."""
    panel.plot([x, x], [y.low, y.high], color=color, linewidth=1.2, alpha=0.7, zorder=2)
    (ring,) = panel.plot(
        [x], [y.mean], "o", color="none", markersize=13, zorder=4, markeredgecolor=color if worst else "none"
    )
    hover(ring, f"{text}, worst case in this panel" if worst else text)


def plot_points(
    panel: Axes,
    points: Sequence[Point],
    color: str,
    label: str,
    crowded: bool = False,
    hollow: bool = False,
) -> None:
    """Draws `points`; `label` is their one entry in the legend."""
    if not points:
        return
    fill, edge = ("none", color) if hollow else (color, SURFACE)
    panel.plot(
        [x.mean for x, _, _ in points],
        [y.mean for _, y, _ in points],
        "o",
        markersize=4 if crowded else 8,
        markerfacecolor=fill,
        markeredgecolor=edge,
        linestyle="none",
        label=label,
        zorder=3,
    )
    for x, y, text in () if crowded else points:
        panel.plot([x.low, x.high], [y.mean, y.mean], color=color, linewidth=1, alpha=0.45, zorder=2)
        panel.plot([x.mean, x.mean], [y.low, y.high], color=color, linewidth=1, alpha=0.45, zorder=2)
        hover(panel.plot([x.mean], [y.mean], "o", color="none", markersize=12, zorder=5)[0], text)
