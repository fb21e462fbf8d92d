"""Several panels in one figure, with one legend."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from secvec.report.axes import Facet
from secvec.report.style import settings

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    from matplotlib.figure import Figure

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
