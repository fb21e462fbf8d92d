"""Which figures there are: in the page one SVG for each panel, so that a phone can stack them; in files whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from secvec.report.axes import MOST_PANELS, Facet, Sweep
from secvec.report.figures.bars import bars_figure
from secvec.report.figures.curves import GroupCurves, loss_figure
from secvec.report.figures.headline import headline_figure
from secvec.report.figures.heatmap import heatmap_figure
from secvec.report.figures.lines import lines_figure
from secvec.report.figures.pareto import SAFETY, UTILITY, pareto_figure
from secvec.report.figures.protection import MEASURES, measured, protection_figure
from secvec.report.groups import Comparison, Group
from secvec.report.metrics import METRICS
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
    """Each of `SWEPT` that was measured, in each facet: `whole` in one figure, else one for each panel of the page."""
    for name in SWEPT if sweep else ():
        assert sweep is not None
        if not any(group.estimate(name) for facet in sweep.facets for group in facet.groups):
            continue
        for number, facet in enumerate(sweep.facets if whole else sweep.facets[:MOST_PANELS]):
            yield from _panels(sweep, facet, name, whole, f"-{number}" if len(sweep.facets) > 1 else "")
    if sweep and sweep.kind == "lines":
        yield from _staleness(sweep, sweep.facets if whole else sweep.facets[:MOST_PANELS])


def _staleness(sweep: Sweep, facets: Sequence[Facet]) -> Iterator[Drawing]:
    """Whether the vector still fits the backbone that it helped to train; only lines can hold what is no rate."""

    def of(facet: Facet) -> Callable[[], Figure]:
        return lambda: lines_figure(sweep, facet, STALENESS, "active")

    for number, facet in enumerate(facets):
        if any(group.estimate(STALENESS, "active") for group in facet.groups):
            over = f"Loss of the vector on the fine-tuned backbone over {sweep.axes[0].key}"
            called = f"sweep-{STALENESS}-vector_on" + (f"-{number}" if len(sweep.facets) > 1 else "")
            yield Drawing(called, f"{over}, {facet.title}".removesuffix(", "), of(facet), STALE)


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
    defenses = _defenses(comparison)

    def of(groups: list[Group], base: Group, title: str) -> Callable[[], Figure]:
        return lambda: pareto_figure(groups, [base], defenses, title)

    found = _of_each_scope(comparison, lambda group: bool(group.estimate(SAFETY) and group.estimate(UTILITY)))
    return [
        Drawing(f"pareto{number}", f"Safety and utility{about}", of(groups, base, title))
        for number, about, groups, base, title in found
    ]


def protection(comparison: Comparison) -> list[Drawing]:
    """What got through against the vector's loss and against the deactivation gap, for each behavior and model."""
    defenses = _defenses(comparison)

    def of(groups: list[Group], name: str, title: str) -> Callable[[], Figure]:
        return lambda: protection_figure(groups, name, defenses, title)

    made = []
    for name in MEASURES:
        for number, about, groups, _, title in _of_each_scope(comparison, partial(measured, name=name)):
            told = f"Behavior rate over {METRICS[name].label.lower()} of the vector{about}"
            made.append(Drawing(f"protection-{name}{number}", told, of(groups, name, title)))
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
