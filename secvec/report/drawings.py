"""Which figures there are: in the page one SVG for each panel, so that a phone can stack them; in files whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from secvec.metrics import METRICS
from secvec.report.axes import MOST_PANELS, Facet, Sweep
from secvec.report.figures.bars import bars_figure
from secvec.report.figures.curves import GroupCurves, loss_figure
from secvec.report.figures.headline import headline_figure
from secvec.report.figures.heatmap import heatmap_figure
from secvec.report.figures.lines import lines_figure
from secvec.report.figures.pareto import SAFETY, UTILITY, pareto_figure
from secvec.report.figures.protection import MEASURES, measured, protection_figure
from secvec.report.figures.scattered import scattered_figure
from secvec.report.groups import Comparison, Group
from secvec.report.style import save

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SWEPT = ("behavior_rate", "task_accuracy", "refusal_rate")
STALENESS = "behavior_loss"  # with the vector on, on the backbone as it is after fine-tuning
STALE = "Behavior loss after fine-tuning, vector on"
FEWEST_POINTS = 3  # fewer make no front


@dataclass(frozen=True)
class Drawing:
    """A figure to be: the name of its file, what it shows in words, and how it is drawn."""

    name: str
    about: str
    draw: Callable[[], Figure]
    metric: str = ""  # its label, where the figure shows one


def swept(sweep: Sweep | None, whole: bool) -> Iterator[Drawing]:
    """Each of `SWEPT` that was measured: `whole` with all panels in one figure, else each panel of the page alone."""
    if sweep is None:
        return
    together = MOST_PANELS if whole else 1
    facets = sweep.facets if whole else sweep.facets[:MOST_PANELS]
    lots = [facets[start : start + together] for start in range(0, len(facets), together)]
    for name in SWEPT:
        if any(group.estimate(name) for facet in sweep.facets for group in facet.groups):
            for number, lot in enumerate(lots):
                yield from _panels(sweep, lot, name, whole, f"-{number}" if len(lots) > 1 else "")
    for number, lot in enumerate(lots if sweep.kind == "lines" else ()):
        yield from _staleness(sweep, lot, f"-{number}" if len(lots) > 1 else "")


def _panels(sweep: Sweep, facets: Sequence[Facet], name: str, whole: bool, number: str) -> Iterator[Drawing]:
    about, called = _about(METRICS[name].label, sweep, facets), f"sweep-{name}{number}"
    if sweep.kind == "lines":
        yield Drawing(called, about, partial(lines_figure, sweep, facets, name), METRICS[name].label)
    elif sweep.kind == "points":
        yield Drawing(called, about, partial(scattered_figure, sweep, facets, name), METRICS[name].label)
    elif sweep.kind == "bars":
        yield Drawing(called, about, partial(bars_figure, sweep, facets, name), METRICS[name].label)
    elif whole:
        yield Drawing(called, about, partial(heatmap_figure, sweep, facets, name, sweep.defenses))
    else:
        for place, defense in enumerate(sweep.defenses):
            if any(group.defense == defense for facet in facets for group in facet.groups):
                draw = partial(heatmap_figure, sweep, facets, name, [defense])
                yield Drawing(f"{called}-{place}", f"{about}, {defense}", draw, METRICS[name].label)


def _staleness(sweep: Sweep, facets: Sequence[Facet], number: str) -> Iterator[Drawing]:
    """Whether the vector still fits the backbone that it helped to train; only lines can hold what is no rate."""
    if any(group.estimate(STALENESS, "active") for facet in facets for group in facet.groups):
        about = _about("Loss of the vector on the fine-tuned backbone", sweep, facets)
        draw = partial(lines_figure, sweep, facets, STALENESS, "active")
        yield Drawing(f"sweep-{STALENESS}-vector_on{number}", about, draw, STALE)


def _about(what: str, sweep: Sweep, facets: Sequence[Facet]) -> str:
    over = f"{what} over {' and '.join(axis.key for axis in sweep.axes)}"
    return f"{over}, {facets[0].title}" if len(facets) == 1 and facets[0].title else over


def scatters(comparison: Comparison) -> list[Drawing]:
    """Safety against utility, one figure for each behavior and model: between them no point beats another."""
    defenses = _defenses(comparison)
    found = _of_each_scope(comparison, lambda group: bool(group.estimate(SAFETY) and group.estimate(UTILITY)))
    return [
        Drawing(f"pareto{n}", f"Safety and utility{about}", partial(pareto_figure, groups, [base], defenses, title))
        for n, about, groups, base, title in found
    ]


def protection(comparison: Comparison) -> list[Drawing]:
    """What got through against the vector's loss and against the deactivation gap, for each behavior and model."""
    made, defenses = [], _defenses(comparison)
    for name in MEASURES:
        for number, about, groups, _, title in _of_each_scope(comparison, partial(measured, name=name)):
            told = f"Behavior rate over {METRICS[name].label.lower()} of the vector{about}"
            draw = partial(protection_figure, groups, name, defenses, title)
            made.append(Drawing(f"protection-{name}{number}", told, draw))
    return made


def _defenses(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(group.defense for group in comparison.groups))


def _of_each_scope(
    comparison: Comparison, has: Callable[[Group], bool]
) -> list[tuple[str, str, list[Group], Group, str]]:
    """For each behavior and model with enough groups that have what is drawn: the number in the file's name, what to
    say after a caption, the groups, the base, the title; number and words are empty where there is one scope."""
    found = []
    for number, base in enumerate(comparison.bases):
        groups = [group for group in comparison.groups if group.scope == base.scope and has(group)]
        if len(groups) >= FEWEST_POINTS:
            title = base.label.removeprefix("base").lstrip(" ·")
            found.append((f"-{number}", f" · {title}" if title else "", groups, base, title))
    return found if len(found) != 1 else [("", *found[0][1:])]


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
    drawings += [*swept(sweep, whole=True), *scatters(comparison), *protection(comparison)]
    for stale in folder.glob("*"):
        if re.fullmatch(r"(headline|losses|sweep-.*|pareto.*|protection.*)\.(svg|png)", stale.name):
            stale.unlink()  # a figure of an earlier report over other records would stand beside the new ones
    written = []
    for drawing in drawings:
        figure = drawing.draw()
        for suffix in (".svg", ".png"):
            save(figure, folder / f"{drawing.name}{suffix}")
            written.append(folder / f"{drawing.name}{suffix}")
    return written
