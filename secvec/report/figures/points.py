"""Estimates as points of a plane, with the intervals of both and words to hover over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from secvec.report.estimate import Estimate
from secvec.report.style import SURFACE, hover

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CROWDED = 150  # points from which on intervals and titles would hide more than they tell


def log_axis(panel: Axes) -> None:
    """Makes x logarithmic, with numbers at its ticks: a formula, matplotlib's way, is not set as one here."""
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter("")


def mark_point(panel: Axes, x: float, y: Estimate, color: str, said: str, worst: bool) -> None:
    """The interval of an estimate at `x`, a ring where it is the worst, and words to hover over."""
    panel.plot([x, x], [y.low, y.high], color=color, linewidth=1.2, alpha=0.7, zorder=2)
    (ring,) = panel.plot([x], [y.mean], "o", color="none", markersize=13, zorder=4,
                         markeredgecolor=color if worst else "none")  # fmt: skip
    hover(ring, f"{said}, worst case in this panel" if worst else said)


def plot_points(
    panel: Axes, points: Sequence[tuple[Estimate, Estimate, str]], color: str, label: str, crowded: bool = False,
    hollow: bool = False,
) -> None:  # fmt: skip
    """Each point is x, y and what to say of it; `label` is their one entry in the legend."""
    if not points:
        return
    fill, edge = ("none", color) if hollow else (color, SURFACE)
    panel.plot([x.mean for x, _, _ in points], [y.mean for _, y, _ in points], "o", markersize=4 if crowded else 8,
               markerfacecolor=fill, markeredgecolor=edge, linestyle="none", label=label, zorder=3)  # fmt: skip
    for x, y, said in () if crowded else points:
        panel.plot([x.low, x.high], [y.mean, y.mean], color=color, linewidth=1, alpha=0.45, zorder=2)
        panel.plot([x.mean, x.mean], [y.low, y.high], color=color, linewidth=1, alpha=0.45, zorder=2)
        hover(panel.plot([x.mean], [y.mean], "o", color="none", markersize=12, zorder=5)[0], said)
