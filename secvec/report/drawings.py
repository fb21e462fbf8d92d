"""The figures of a report: in the page one SVG for each panel, so that a phone can stack them; in files whole."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from secvec.metrics import METRICS
from secvec.report.axes import MOST_PANELS, Facet, Sweep
from secvec.report.figures.curves import GroupCurves, groups_with, loss_figure, rates_figure
from secvec.report.figures.headline import headline_figure, headline_names
from secvec.report.figures.heatmap import heatmap_figure
from secvec.report.figures.one_setting import bars_figure, lines_figure, points_figure
from secvec.report.figures.scatter import MEASURES, SAFETY, UTILITY, measured, pareto_figure, protection_figure
from secvec.report.groups import Comparison, Group
from secvec.report.style import save

SWEPT = ("behavior_rate", "task_accuracy", "refusal_rate")
STALENESS = "behavior_loss"  # with the vector on, on the backbone as it is after fine-tuning
CURVES = {  # name of the file -> prefix of the metrics, description, figure
    "losses": ("telemetry/", "Loss over fine-tuning steps", loss_figure),
    "during": ("during/", "Behavior and task over fine-tuning steps", rates_figure),
}
FEWEST_POINTS = 3  # fewer make no front
ONE_PLOT = {"lines": lines_figure, "points": points_figure, "bars": bars_figure}
"""Kinds of sweep with all defenses in one plot."""


@dataclass(frozen=True)
class Drawing:
    """A figure that is not drawn yet: the name of its file, a description, and the function that draws it."""

    name: str
    about: str
    draw: Callable[[], Figure]
    heading: str = ""
    """What several drawings of a section have in common, as their metric."""


def headline(shown: Comparison, whole: bool) -> list[Drawing]:
    """Rates of each column: in one figure (`whole`), or in one for each metric."""
    names = headline_names(shown) if shown.groups else []
    if whole:
        return [Drawing("headline", "Rates of each column", partial(headline_figure, shown, names))] if names else []
    about = "of each column with its interval; the values are in the results table"
    return [
        Drawing(f"headline-{name}", f"{METRICS[name].label} {about}", partial(headline_figure, shown, [name]))
        for name in names
    ]


def curves(name: str, groups: Sequence[Group], found: GroupCurves, whole: bool) -> list[Drawing]:
    """`losses` or rates (`during`) over the steps of fine-tuning: in one figure (`whole`), or one for each group."""
    prefix, about, figure = CURVES[name]
    measured = groups_with(found, prefix)
    if whole:
        return [Drawing(name, about, partial(figure, groups, found, measured))] if measured else []
    return [
        Drawing(f"{name}-{index}", f"{about}, {label}", partial(figure, groups, found, [index]), label)
        for index, label in ((index, groups[index].label) for index in measured)
    ]


def swept(sweep: Sweep | None, whole: bool) -> Iterator[Drawing]:
    """Each of `SWEPT` that was measured: `whole` with all panels in one figure, else each panel of the page alone.

    Over one number also the loss of the vector on the fine-tuned backbone: whether it still fits the backbone that it
    helped to train.
    """
    if sweep is None:
        return
    together = MOST_PANELS if whole else 1
    facets = sweep.facets if whole else sweep.facets[:MOST_PANELS]
    parts = [facets[start : start + together] for start in range(0, len(facets), together)]
    numbered = [(f"-{number}" if len(parts) > 1 else "", part) for number, part in enumerate(parts)]
    for name in SWEPT:
        if _measured(sweep.facets, name):
            for number, part in numbered:
                yield from _panels(sweep, part, name, whole, number)
    for number, part in numbered if sweep.kind == "lines" else ():
        if _measured(part, STALENESS, "active"):
            about = _about("Loss of the vector on the fine-tuned backbone", sweep, part)
            draw = partial(lines_figure, sweep, part, STALENESS, "active")
            heading = "Behavior loss after fine-tuning, vector on"
            yield Drawing(f"sweep-{STALENESS}-vector_on{number}", about, draw, heading)


def _measured(facets: Sequence[Facet], name: str, phase: str = "after") -> bool:
    return any(group.estimate(name, phase) for facet in facets for group in facet.groups)


def _panels(sweep: Sweep, facets: Sequence[Facet], name: str, whole: bool, number: str) -> Iterator[Drawing]:
    label = METRICS[name].label
    about, file = _about(label, sweep, facets), f"sweep-{name}{number}"
    if sweep.kind != "heatmap":
        yield Drawing(file, about, partial(ONE_PLOT[sweep.kind], sweep, facets, name), label)
    elif whole:
        yield Drawing(file, about, partial(heatmap_figure, sweep, facets, name, sweep.defenses), label)
    else:
        for place, defense in enumerate(sweep.defenses):
            if any(group.defense == defense for facet in facets for group in facet.groups):
                draw = partial(heatmap_figure, sweep, facets, name, [defense])
                yield Drawing(f"{file}-{place}", f"{about}, {defense}", draw, label)


def _about(what: str, sweep: Sweep, facets: Sequence[Facet]) -> str:
    over = f"{what} over {' and '.join(axis.key for axis in sweep.axes)}"
    return f"{over}, {facets[0].title}" if len(facets) == 1 and facets[0].title else over


def scatters(comparison: Comparison) -> list[Drawing]:
    """Task accuracy over behavior rate, with the Pareto front: one figure for each behavior and model."""
    found = _scopes(comparison, lambda group: bool(group.estimate(SAFETY) and group.estimate(UTILITY)))
    defenses = comparison.defenses
    return [
        Drawing(f"pareto{n}", f"Safety and utility{about}", partial(pareto_figure, groups, [base], defenses, title))
        for n, about, groups, base, title in found
    ]


def protection(comparison: Comparison) -> list[Drawing]:
    """Behavior rate over the vector's loss and over the deactivation gap, for each behavior and model."""
    return [
        Drawing(
            f"protection-{name}{n}",
            f"Behavior rate over {METRICS[name].label.lower()} of the vector{about}",
            partial(protection_figure, groups, name, comparison.defenses, title),
        )
        for name in MEASURES
        for n, about, groups, _, title in _scopes(comparison, partial(measured, name=name))
    ]


def _scopes(comparison: Comparison, has: Callable[[Group], bool]) -> list[tuple[str, str, list[Group], Group, str]]:
    """For each behavior and model with enough groups that have what is drawn: the number in the file's name, what
    follows a caption, the groups, their base, the title. Number and caption are empty where there is one scope."""
    found = []
    for number, base in enumerate(comparison.bases):
        groups = [group for group in comparison.groups if comparison.base_of(group) is base and has(group)]
        if len(groups) >= FEWEST_POINTS:
            title = base.label.removeprefix("base").lstrip(" ·")
            found.append((f"-{number}", f" · {title}" if title else "", groups, base, title))
    return found if len(found) != 1 else [("", *found[0][1:])]


def save_all(drawings: Sequence[Drawing], folder: Path) -> list[Path]:
    """Writes every figure as .svg and .png; the paths. Figures of an earlier report in `folder` are removed."""
    for stale in folder.glob("*"):
        if re.fullmatch(r"(headline|losses|during|sweep-.*|pareto.*|protection.*)\.(svg|png)", stale.name):
            stale.unlink()
    written = []
    for drawing in drawings:
        figure = drawing.draw()
        for suffix in (".svg", ".png"):
            save(figure, folder / f"{drawing.name}{suffix}")
            written.append(folder / f"{drawing.name}{suffix}")
    return written
