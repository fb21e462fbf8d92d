"""What all figures share: colors, panels, legend, texts on hover, and how a figure becomes SVG text or a file."""

import io
import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from html import escape
from pathlib import Path
from typing import Any, Literal, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from secvec.metrics import Metric
from secvec.report.axes import Facet
from secvec.report.estimate import Estimate
from secvec.report.groups import Group
from secvec.runs.files import write_atomic

Drawn = TypeVar("Drawn", bound=Artist)
Look = dict[str, Any]
"""Keyword arguments of matplotlib."""

INK, MUTED, GRID, SURFACE, BASE = "#1c2128", "#59636e", "#d8dee4", "#fefefe", "#6e7782"
# Okabe and Ito: told apart with the common color-vision deficiencies. The yellow is left out, it fails on white; the
# last two, a brown and a violet, are not theirs: eight defenses side by side are few enough to want a color each.
SERIES = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a4a1e", "#5b3a9e")
# In the page these colors become CSS variables, so that one figure serves light, dark and print.
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--rule", SURFACE: "--card", BASE: "--base"} | {
    color: f"--s{index}" for index, color in enumerate(SERIES)
}


def series_color(index: int) -> str:
    """The color of the `index`-th group."""
    return SERIES[index % len(SERIES)]


def better(metric: Metric) -> str:
    """Which way the metric is better, with its arrow."""
    words = {"low": "lower is better", "high": "higher is better"}
    return f"{metric.arrow} {words.get(metric.better or '', '')}".strip()


def direction(panel: Axes, metric: Metric, held: str) -> None:
    """The panel's title: the metric, which way is better, and what the panel holds fixed."""
    if held:  # the right title would run into a long left one
        panel.set_title(f"{metric.title}\n{held}", fontsize=10)
    else:
        panel.set_title(metric.label)
        panel.set_title(better(metric), loc="right", fontsize=9.5, color=MUTED, fontweight="normal")


def log_axis(panel: Axes) -> None:
    """Makes x logarithmic, with plain numbers at its ticks: matplotlib's own are formulas, which are switched off."""
    panel.set_xscale("log")
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter("")


def facets_figure(draw: Callable[[Axes, Facet], None], facets: Sequence[Facet], width: float, height: float) -> Figure:
    """A panel of `width` by `height` inches for each of `facets`, which `draw` fills, and one legend."""
    with settings():
        figure, panels = panels_figure(len(facets), width, height)
        for panel, facet in zip(panels, facets, strict=True):
            draw(panel, facet)
        legend(figure, panels)
    return figure


def panels_figure(count: int, width: float, height: float, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of `width` by `height` inches, `columns` of them in a row."""
    columns = min(count, columns)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flatten())
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]


def legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend below the panels, each entry once."""
    entries: dict[str, Artist] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(str(label), handle)
    if entries:
        columns = 2 * max(1, round(figure.get_figwidth() / 5.4))
        figure.legend(list(entries.values()), list(entries), loc="outside lower center", ncols=columns, fontsize=9.5)


def spoken(group: Group, found: Estimate, metric: Metric, worst: bool = False) -> str:
    """A point in words: shown on hover, and read by screen readers."""
    interval = f" [{metric.text(found.low)}, {metric.text(found.high)}]" if found.kind != "none" else ""
    text = f"{group.label}: {metric.label.lower()} {metric.text(found.mean)}{interval}, {len(found.by_seed)} seed(s)"
    return f"{text}, worst case in this panel" if worst else text


def hover(artist: Drawn, text: str) -> Drawn:
    """Gives the artist a title in SVG; matplotlib has no way for one, so it travels in the id, as hex digits."""
    artist.set_gid(f"title-{text.encode().hex()}")
    return artist


def _titled(svg: str) -> str:
    """The SVG with the texts of `hover` as title elements."""

    def title(found: re.Match[str]) -> str:
        return f"<g><title>{escape(bytes.fromhex(found[1]).decode())}</title>"

    return re.sub(r'<g id="title-([0-9a-f]*)">', title, svg)


def settings(fonttype: Literal["path", "none"] = "path") -> AbstractContextManager[None]:
    """matplotlib settings under which equal input gives equal bytes."""
    look: Look = (
        dict.fromkeys(("text.color", "axes.titlecolor", "ytick.labelcolor", "legend.labelcolor"), INK)
        | dict.fromkeys(("axes.labelcolor", "xtick.labelcolor"), MUTED)
        | dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), GRID)
        | dict.fromkeys(("text.parse_math", "axes.spines.top", "axes.spines.right", "legend.frameon"), False)
        | {"svg.hashsalt": "secvec", "svg.fonttype": fonttype, "font.family": "DejaVu Sans", "font.size": 10.5}
        | {"axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.titlelocation": "left"}
        | {"axes.facecolor": "none", "axes.axisbelow": True, "grid.linewidth": 0.8}
        | dict.fromkeys(("xtick.major.size", "xtick.minor.size", "ytick.major.size", "ytick.minor.size"), 0)
    )
    return rc_context(look)  # type: ignore[arg-type]


def inline_svg(figure: Figure, name: str, description: str) -> str:
    """The figure as an SVG element for the page; ids start with `name`, which must be unique in the page."""
    buffer = io.StringIO()
    none = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with settings("none"):
        figure.savefig(buffer, format="svg", transparent=True, metadata=none)
    text = _titled(buffer.getvalue())
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href=", "href=")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)


def save(figure: Figure, path: Path) -> None:
    """Write the figure, .svg or .png by the suffix, on an opaque ground; the file appears whole or not at all."""
    none = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    buffer = io.BytesIO()
    with settings():
        figure.savefig(buffer, format=path.suffix[1:], dpi=160, facecolor="white", bbox_inches="tight", metadata=none)
    drawn = buffer.getvalue()
    write_atomic(path, _titled(drawn.decode()) if path.suffix == ".svg" else drawn)


def template(name: str) -> Template:
    """A template of this folder; what it is given is escaped."""
    loader = FileSystemLoader(Path(__file__).parent)
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return made.get_template(name)
