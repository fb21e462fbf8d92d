"""Which figures there are: in the page one SVG for each panel, so that a phone can stack them; in files whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from secvec.report.axes import MOST_PANELS, Facet, Sweep
from secvec.report.figures.bars import bars_figure
from secvec.report.figures.curves import GroupCurves, loss_figure
from secvec.report.figures.headline import headline_figure
from secvec.report.figures.heatmap import heatmap_figure
from secvec.report.figures.lines import lines_figure
from secvec.report.figures.pareto import SAFETY, UTILITY, pareto_figure
from secvec.report.groups import Comparison, Group
from secvec.report.metrics import METRICS
from secvec.report.style import save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SWEPT = ("behavior_rate", "task_accuracy", "refusal_rate")
FEWEST_POINTS = 3  # fewer make no front


@dataclass(frozen=True)
class Drawing:
    """A figure to be: the name of its file, what it shows in words, and how it is drawn."""

    name: str
    about: str
    draw: Callable[[], Figure]
    metric: str = ""  # its label, where the figure shows one


def swept(sweep: Sweep | None, whole: bool) -> Iterator[Drawing]:
    """Each of `SWEPT` that was measured, in each facet: `whole` in one figure, else one for each panel of the page."""
    for name in SWEPT if sweep else ():
        assert sweep is not None
        if not any(group.estimate(name) for facet in sweep.facets for group in facet.groups):
            continue
        for number, facet in enumerate(sweep.facets if whole else sweep.facets[:MOST_PANELS]):
            yield from _panels(sweep, facet, name, whole, f"-{number}" if len(sweep.facets) > 1 else "")


def _panels(sweep: Sweep, facet: Facet, name: str, whole: bool, number: str) -> Iterator[Drawing]:
    about = f"{METRICS[name].label} over {' and '.join(axis.key for axis in sweep.axes)}"
    about += f", {facet.title}" if facet.title else ""
    called = f"sweep-{name}{number}"
    if sweep.kind == "lines":
        yield Drawing(called, about, lambda: lines_figure(sweep, facet, name), METRICS[name].label)
    elif sweep.kind == "bars":
        yield Drawing(called, about, lambda: bars_figure(sweep, facet, name), METRICS[name].label)
    elif whole:
        yield Drawing(called, about, lambda: heatmap_figure(sweep, facet, name, sweep.defenses))
    else:
        for place, defense in enumerate(sweep.defenses):
            if any(group.defense == defense for group in facet.groups):
                draw = _heatmap(sweep, facet, name, defense)
                yield Drawing(f"{called}-{place}", f"{about}, {defense}", draw, METRICS[name].label)


def _heatmap(sweep: Sweep, facet: Facet, name: str, defense: str) -> Callable[[], Figure]:
    return lambda: heatmap_figure(sweep, facet, name, [defense])


def scatters(comparison: Comparison) -> list[Drawing]:
    """Safety against utility, one figure for each behavior and model: between them no point beats another."""
    defenses = list(dict.fromkeys(group.defense for group in comparison.groups))
    made = []
    for number, base in enumerate(comparison.bases):
        groups = [g for g in comparison.groups if g.scope == base.scope and g.estimate(SAFETY) and g.estimate(UTILITY)]
        if len(groups) >= FEWEST_POINTS:
            title = base.label.removeprefix("base").lstrip(" ·")
            draw = _scatter(groups, base, defenses, title)
            made.append(Drawing(f"pareto-{number}", " · ".join(filter(None, ["Safety and utility", title])), draw))
    return made if len(made) != 1 else [Drawing("pareto", made[0].about, made[0].draw)]


def _scatter(groups: list[Group], base: Group, defenses: list[str], title: str) -> Callable[[], Figure]:
    return lambda: pareto_figure(groups, [base], defenses, title)


def save_all(
    shown: Comparison, comparison: Comparison, sweep: Sweep | None, curves: GroupCurves, folder: Path
) -> list[Path]:
    """Write every figure as .svg and .png; the paths of those there was data for. `curves` belong to `shown`."""
    drawings: list[Drawing] = []
    if shown.groups:
        drawings.append(Drawing("headline", "", lambda: headline_figure(shown)))
    drawn = [index for index in range(len(shown.groups)) if curves.get(index)]
    if drawn:
        drawings.append(Drawing("losses", "", lambda: loss_figure(shown.groups, curves, drawn)))
    drawings += [*swept(sweep, whole=True), *scatters(comparison)]
    for stale in folder.glob("*"):
        if re.fullmatch(r"(headline|losses|sweep-.*|pareto.*)\.(svg|png)", stale.name):
            stale.unlink()  # a figure of an earlier report over other records would stand beside the new ones
    written = []
    for drawing in drawings:
        figure = drawing.draw()
        for suffix in (".svg", ".png"):
            save(figure, folder / f"{drawing.name}{suffix}")
            written.append(folder / f"{drawing.name}{suffix}")
    return written
