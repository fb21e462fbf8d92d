"""The settings that vary over the records, as axes: which figure they call for, and what each of its panels holds."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Literal

from secvec.report.groups import Comparison, Group, plain, sortable

LONGEST = 26  # characters of a value in a figure
MOST_PANELS = 6
TICK_ROOM = 0.07  # of the axis, that the text of a tick takes
Kind = Literal["lines", "bars", "heatmap", "points"]
SPARSE = 0.5  # of the cells of a heat map that are filled: with fewer, as after a search, it shows hardly anything


@dataclass(frozen=True)
class Axis:
    """One varying setting with its values, JSON texts in order: numbers by size, then texts."""

    key: str
    values: tuple[str, ...]

    @cached_property
    def numeric(self) -> bool:
        """Whether every value is a number."""
        return all(sortable(value)[0] == 0 for value in self.values)

    @cached_property
    def log(self) -> bool:
        """Whether the values call for a logarithmic scale: three or more positive ones that span a factor of 8."""
        places = [sortable(value)[1] for value in self.values]
        return self.numeric and len(places) > 2 and places[0] > 0 and places[-1] / places[0] >= 8

    def place(self, value: str) -> float:
        """Where `value` stands: the number itself, or the position of a category."""
        return sortable(value)[1] if self.numeric else float(self.values.index(value))

    def text(self, value: str) -> str:
        """`value` as written in a figure."""
        if not value:
            return "not set"
        if self.numeric:
            number = json.loads(value)
            return str(number) if isinstance(number, int) else f"{number:g}"
        shown = plain(value)
        if len(shown) > LONGEST and self._shared:
            shown = f"…{shown[len(self._shared) :]}"
        return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"

    @cached_property
    def _shared(self) -> str:
        """What all categories begin with, up to the end of a word: long names differ at their ends."""
        start = commonprefix([plain(value) for value in self.values]) if len(self.values) > 1 else ""  # noqa: RUF071 (by character is what is meant)
        return start[: max(start.rfind(mark) for mark in "-/. ") + 1]


@dataclass(frozen=True)
class Facet:
    """The groups that share the values of all axes but those of the figure; `title` names these values."""

    title: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Sweep:
    """What to draw over one axis or two; every group stands in exactly one facet, and nothing is averaged over one."""

    kind: Kind
    axes: tuple[Axis, ...]
    facets: tuple[Facet, ...]
    defenses: list[str]  # in the order of the whole comparison: a defense has one color in all figures
    _index: dict[str, int]  # key -> its place among a group's values
    beside: tuple[Axis, ...] = ()  # numbers that are neither on an axis nor held by a panel: written at the points

    def value(self, group: Group, axis: Axis) -> str:
        """The group's value on `axis`, "" where it has no such setting."""
        return group.values[self._index[axis.key]]

    @property
    def reading(self) -> str:
        """What the figure shows, holds and leaves out, in words."""
        over = " and ".join(axis.key for axis in self.axes)
        sentences = [f"Over {over}; every point is one configuration, a mean over its seeds alone."]
        if len(self.facets) > 1:
            sentences.append("Each panel holds the other settings fixed at what its title says; none is averaged over.")
        if len(self.facets) > MOST_PANELS:
            sentences.append(
                f"The page draws the first {MOST_PANELS} of {len(self.facets)} panels in the order of their settings; "
                "`python -m secvec.report DIR --figures DIR` writes all of them."
            )
        return " ".join(sentences)


def axes(comparison: Comparison) -> tuple[Axis, ...]:
    """The settings in which the groups differ, each with the values that occur."""
    found = []
    for index, key in enumerate(comparison.keys):
        values = {group.values[index] for group in comparison.groups} - {""}
        found.append(Axis(key, tuple(sorted(values, key=sortable))))
    return tuple(found)


def sweep(comparison: Comparison) -> Sweep | None:
    """Lines over one number, bars over one category, a heat map over two of a kind; None when only defenses differ.

    Of more numbers (without any, categories) the two with most values span the heat map; the others make the facets.
    Where most of its cells would be empty, points over the number with most values, the other numbers beside them.
    """
    found = axes(comparison)
    if not found:
        return None
    numbers = [axis for axis in found if axis.numeric and len(axis.values) > 1]
    categories = [axis for axis in found if axis not in numbers]
    kind: Kind
    if len(numbers) == 1:
        kind, chosen = "lines", tuple(numbers)
    elif not numbers and len(categories) == 1:
        kind, chosen = "bars", tuple(categories)
    else:
        most = sorted(numbers or categories, key=lambda axis: -len(axis.values))[:2]
        kind, chosen = "heatmap", tuple(most)
    beside: tuple[Axis, ...] = ()
    if kind == "heatmap" and numbers and _filled(comparison, found) < SPARSE:
        kind, chosen, beside = "points", chosen[:1], tuple(axis for axis in numbers if axis != chosen[0])
    others = [(index, axis) for index, axis in enumerate(found) if axis not in (*chosen, *beside)]
    parts: dict[tuple[str, ...], list[Group]] = {}
    for group in comparison.groups:
        parts.setdefault(tuple(group.values[index] for index, _ in others), []).append(group)
    facets = []
    for part in sorted(parts, key=lambda values: tuple(map(sortable, values))):
        held = [f"{axis.key} = {axis.text(value)}" for (_, axis), value in zip(others, part, strict=True)]
        facets.append(Facet(", ".join(held), tuple(parts[part])))
    places = {key: index for index, key in enumerate(comparison.keys)}
    return Sweep(kind, chosen, tuple(facets), comparison.defenses, places, beside)


def _filled(comparison: Comparison, found: Sequence[Axis]) -> float:
    """The share of all combinations of values that the defense with most configurations has."""
    counts = Counter(group.defense for group in comparison.groups)
    return max(counts.values()) / math.prod(max(1, len(axis.values)) for axis in found)


def ticks(axis: Axis) -> tuple[list[float], list[str]]:
    """Places and texts of the values; on a crowded axis only as many as can be read, the last one among them."""
    places = [axis.place(value) for value in axis.values]
    scaled = [math.log(place) for place in places] if axis.log else places
    room = (scaled[-1] - scaled[0]) * TICK_ROOM if axis.numeric else 0.0
    shown = [len(places) - 1]
    for number in reversed(range(len(places) - 1)):
        if scaled[shown[-1]] - scaled[number] >= room:
            shown.append(number)
    return [places[i] for i in reversed(shown)], [axis.text(axis.values[i]) for i in reversed(shown)]
