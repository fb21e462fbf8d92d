"""Behavior rate over properties of the vector: one point for each configuration that has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from secvec.metrics import METRICS
from secvec.report.figures.panels import legend, panels_figure
from secvec.report.figures.points import CROWDED, log_axis, plot_points, points_of
from secvec.report.groups import Group
from secvec.report.style import direction, series_color, settings
from secvec.report.worst import by_defense

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROTECTION = "behavior_rate"
MEASURES = {  # metric -> phase it is measured in, and what the axis says
    "behavior_loss": ("vector_on", "Vector's loss on held-out undesired samples, nats per token"),
    "deactivation_gap": ("after", "Deactivation gap: task accuracy, vector on minus off"),
}


def measured(group: Group, name: str) -> bool:
    """Whether the group has a place in the figure over metric `name`."""
    return bool(group.estimate(name, MEASURES[name][0]) and group.estimate(PROTECTION))


def protection_figure(groups: Sequence[Group], name: str, defenses: Sequence[str], title: str = "") -> Figure:
    """Behavior rate over metric `name` of `MEASURES`; `groups` are all `measured`, `defenses` give the colors."""
    with settings():
        figure, (panel,) = panels_figure(1, 5.6, 3.9)
        direction(panel, METRICS[PROTECTION], title)
        for defense, mine in by_defense(groups).items():
            points = points_of(mine, name, PROTECTION, MEASURES[name][0])
            plot_points(panel, points, series_color(defenses.index(defense)), defense, len(groups) >= CROWDED)
        places = [x.mean for x, _, _ in points_of(groups, name, PROTECTION, MEASURES[name][0])]
        if min(places) > 0 and max(places) / min(places) >= 8:
            log_axis(panel)
        panel.set_xlabel(MEASURES[name][1])
        panel.set_ylim(-0.06, 1.06)
        panel.tick_params(length=0, which="both")
        panel.grid()
        legend(figure, [panel])
    return figure
