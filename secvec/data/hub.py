"""Hugging Face datasets: where the rows come from, which split a row belongs to, how a row becomes text.

Rows stay in memory-mapped Arrow tables; only the rows that drawing looks at become Python objects.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Annotated, Any, ClassVar, Literal

from jinja2 import TemplateError, TemplateSyntaxError, Undefined, UndefinedError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import AfterValidator, ConfigDict, Field, model_validator

from secvec.data.example import SPLITS, Example, Shares, Split, Stream, same_text
from secvec.data.tables import load
from secvec.errors import DataError, TooFewError, nearest
from secvec.settings.schema import Count, Seed, Settings

CHUNK = 512
"""Rows that become Python objects at a time."""

Row = Mapping[str, Any]
Scalar = bool | int | float | str


class _Absent(Undefined):
    """An item that a list lacks is empty text; a key that a mapping lacks is an error."""

    def __str__(self) -> str:
        if isinstance(self._undefined_obj, Mapping):
            key, known = str(self._undefined_name), self._undefined_obj
            raise DataError(f"template: no key {key!r}{nearest(key, known)}; available: {', '.join(known)}")
        return ""


def _shown(value: Any) -> Any:
    """What is missing (None, NaN) is empty, a list has one item a line."""
    missing = value is None or value != value  # NaN alone is not itself
    return "" if missing else "\n".join(map(str, value)) if isinstance(value, list) else value


JINJA = ImmutableSandboxedEnvironment(undefined=_Absent, finalize=_shown)
_compiled = lru_cache(JINJA.from_string)


def _is_template(text: str) -> str:
    try:
        JINJA.from_string(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"this is no Jinja template: {error}") from None
    if not columns_of(text) and (old := re.search(r"\{(\w+)(\[\w+\])?\}", text)):
        raise ValueError(f"a column is named in double braces: {{{old[0]}}}, not {old[0]}")
    return text


def columns_of(template: str) -> set[str]:
    """The columns that `template` names."""
    return meta.find_undeclared_variables(JINJA.parse(template))


RowTemplate = Annotated[str, AfterValidator(_is_template)]
"""A Jinja template that names columns: `"{{instruction}}\\n{{input}}"`, `"{{ [a, b, c][label] }}"`."""


def fill(template: str, row: Row) -> str:
    """The text that `template` gives for `row`; empty if the row lacks an item (an index that is too large).

    Raises DataError for what the sandbox forbids, and for a key that a column's mapping lacks.
    """
    try:
        return _compiled(template).render(row).strip()
    except (TypeError, UndefinedError):
        return ""
    except TemplateError as error:
        raise DataError(f"template {template!r}: {error}") from None


class Bounds(Settings):
    """The numbers that pass a filter."""

    model_config = ConfigDict(allow_inf_nan=True)  # no bound

    min: float = float("-inf")
    max: float = float("inf")


class HubData(Settings):
    """A dataset of the hub, or local files with the same columns. The hash of a prompt decides its split."""

    dataset: str
    """Hub id: owner/name."""
    config: str | None = None
    data_dir: str | None = None
    revision: str
    """Commit, tag or branch on the hub."""
    local_path: Path | None = None
    """Used instead of the hub if it exists: a file, a folder of files, a copy of the repository, or a folder written
    by `save_to_disk`."""
    split: str = "train"
    """The dataset's split from which all our splits are taken."""
    splits: dict[Split, str] = Field(default_factory=dict)
    """Our split -> the dataset's, if it is another one. A prompt in several belongs to the last of our splits."""
    shares: Shares = Shares()
    split_seed: Seed = 0
    """Decides which prompt is in which split. It is not the run's seed: runs of all seeds share an aligned model."""
    filter: dict[str, Scalar | list[Scalar] | Bounds | None] = Field(default_factory=dict)
    """Column -> a value, a list of allowed values, {min: , max: }, or null for any. For a column of flags or labels:
    names, at least one of which must be set."""
    prompt: RowTemplate
    max_chars: Count | None = None
    """Longer rows (prompt and response together) are left out; None: no limit."""
    repeat_prompts: bool = False
    """Whether training uses all responses to the same prompt. Validation and test use a prompt once."""

    derived: ClassVar[frozenset[str]] = frozenset()
    """What `fields` adds to the columns."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Columns that `fields` reads."""

    @model_validator(mode="after")
    def _each_split_has_a_share(self) -> HubData:
        for name in {self._from(split) for split in SPLITS}:
            if not sum(getattr(self.shares, split) for split in self._splits_of(name)):
                raise ValueError(f"shares: the splits taken from {name!r} have no share at all")
        return self

    @property
    def is_local(self) -> bool:
        """Whether the rows are on this machine."""
        return self.local_path is not None and self.local_path.exists()

    def fields(self, row: Row) -> Row | None:
        """The row as the templates see it; None leaves the row out."""
        return row

    def templates(self) -> list[str]:
        """All templates but the prompt's. The columns they name must exist."""
        raise NotImplementedError

    def answer(self, split: Split, row: Row) -> tuple[str, dict[str, str]]:
        """Response and facts of a row; an empty response leaves the row out."""
        raise NotImplementedError

    def examples(self, split: Split, n: int | None, seed: int) -> list[Example]:
        """The first `n` examples of `split` under `seed`.

        Raises TooFewError if there are fewer, and DataError if a column that a template names is missing.
        """
        if n == 0:
            return []
        name, once = self._from(split), not self.repeat_prompts or split in ("validation", "test")
        low, high = self._band(split)
        taken = self._taken_by_later_splits(name)
        found: list[Example] = []
        seen: set[tuple[str, str]] = set()
        where = self._where(name)
        for number, fields in self._rows(name, self.templates(), Random(f"{split}/{seed}")):
            prompt = fill(self.prompt, fields)
            key = same_text(prompt)
            place = self._place(key)
            if not key or not low <= place < high or place in taken:
                continue
            response, facts = self.answer(split, fields)
            identity = (key, "" if once else response)
            length = len(prompt) + len(response)
            if not response or identity in seen or length > (self.max_chars or length):
                continue
            seen.add(identity)
            kind = self.kind  # type: ignore[attr-defined]  # a field of the subclasses
            found.append(Example((("user", prompt),), response, kind, facts, f"{where}:{number}"))
            if len(found) == n:
                return found
        if n is None and found:
            return found
        raise TooFewError(
            f"{where} has {len(found)} usable {'prompts' if once else 'rows'} for split {split!r} (of "
            f"{len(self.table(name))} rows), but the run needs {n or 'some'}: lower the number, raise "
            f"shares.{split}, or loosen filter and max_chars",
            len(found),
        )

    def table(self, name: str) -> Any:
        """The `datasets.Dataset` of the dataset's split `name`. Raises DataError."""
        return load(self.dataset, self.config, self.data_dir, self.revision, self.local_path, name)

    def _rows(self, name: str, templates: Sequence[str], rng: Random | None = None) -> Iterator[tuple[int, Row]]:
        """Number and fields of each row that passes the filter, shuffled; without `rng`, of all rows in order."""
        table, where = self.table(name), self._where(name)
        wanted = {name: value for name, value in self.filter.items() if value is not None} if rng else {}
        named = set().union(*map(columns_of, (self.prompt, *templates)))
        columns = self.needs | wanted.keys() | (named - self.derived)
        present = table.column_names
        if missing := sorted(columns - set(present)):
            raise DataError(
                f"{where}: no column {', '.join(map(repr, missing))}{nearest(missing[0], present)}; "
                f"available: {', '.join(present)}"
            )
        table = table.select_columns(sorted(columns)) if columns else table
        order = rng.sample(range(len(table)), len(table)) if rng else range(len(table))
        for start in range(0, len(order), CHUNK):
            numbers = order[start : start + CHUNK]
            chunk = table[numbers]
            for number, values in zip(numbers, zip(*chunk.values(), strict=True), strict=True):
                row = dict(zip(chunk, values, strict=True))
                if all(passes(row[name], value, f"{where}: filter.{name}") for name, value in wanted.items()):
                    fields = self.fields(row)
                    if fields is not None:
                        yield number, fields

    def _from(self, split: Split) -> str:
        return self.splits.get(split, self.split)

    def _splits_of(self, name: str) -> list[Split]:
        return [split for split in SPLITS if self._from(split) == name]

    def _band(self, split: Split) -> tuple[int, int]:
        """The range of hashes of `split`, among the splits that come from the same split of the dataset."""
        members = self._splits_of(self._from(split))
        shares = [getattr(self.shares, member) for member in members]
        first = members.index(split)
        low, high = (round(sum(shares[:end]) / sum(shares) * 2**64) for end in (first, first + 1))
        return low, high

    def _place(self, key: str) -> int:
        return int.from_bytes(blake2b(f"{self.split_seed}/{key}".encode(), digest_size=8).digest())

    def _taken_by_later_splits(self, name: str) -> set[int]:
        """Hashes of the prompts that also occur in the dataset's split of one of our later splits.

        So the test prompts of a benchmark stay complete, and no training sample has one.
        """
        names = list(dict.fromkeys(self._from(split) for split in reversed(SPLITS)))
        return {
            self._place(same_text(fill(self.prompt, fields)))
            for later in names[: names.index(name)]
            for _, fields in self._rows(later, ())
        }

    def _where(self, name: str) -> str:
        return f"{self.local_path if self.is_local else f'{self.dataset}@{self.revision}'}[{name}]"


class HubStream(HubData, Stream):
    """Benign data: a `task` is to be learned, `ordinary` data must stay as it is."""

    kind: Literal["task", "ordinary"]
    response: RowTemplate

    def templates(self) -> list[str]:
        """That of the response."""
        return [self.response]

    def answer(self, split: Split, row: Row) -> tuple[str, dict[str, str]]:
        """The response, no facts."""
        return fill(self.response, row), {}


def passes(cell: Any, wanted: Scalar | list[Scalar] | Bounds, where: str) -> bool:
    """Whether a cell passes a filter. Raises DataError for a flag that the column lacks."""
    if isinstance(wanted, Bounds):
        try:
            return wanted.min <= float(cell) <= wanted.max
        except (TypeError, ValueError):
            return False
    allowed = wanted if isinstance(wanted, list) else [wanted]
    if isinstance(cell, dict):
        if unknown := [str(name) for name in allowed if name not in cell]:
            raise DataError(f"{where}: no {unknown[0]!r}{nearest(unknown[0], cell)}; available: {', '.join(cell)}")
        return any(cell[name] for name in allowed)
    if isinstance(cell, list):
        return any(item in allowed for item in cell)
    texts = {str(item).casefold() for item in allowed if not isinstance(item, str)}  # a csv has texts alone
    return cell in allowed or (isinstance(cell, str) and cell.casefold() in texts)
