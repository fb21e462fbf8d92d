"""Hugging Face datasets: where their rows are found, which of them a split gets, and how a row becomes text.

Rows stay in memory-mapped Arrow tables; only those that are looked at while drawing become Python objects.
"""

from __future__ import annotations

import logging
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from secvec.data.example import SPLITS, Example, Kind, Split
from secvec.errors import DataError, nearest
from secvec.settings.schema import Count, Seed, Settings, Share

log = logging.getLogger(__name__)

FORMATS = {
    ".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
COMPRESSED = (".gz", ".xz", ".zst", ".bz2")
CHUNK = 512
"""Rows that become Python objects at a time."""

Row = Mapping[str, Any]
Scalar = bool | int | float | str


class _Filler(string.Formatter):
    """Like `str.format`; a missing value is empty, a list has one item a line."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            return ""
        return "\n".join(map(str, value)) if isinstance(value, list) else str(format(value, format_spec))


def columns_of(template: str) -> set[str]:
    """The columns that a template names: `{answers[0]}` names `answers`."""
    return {re.split(r"[\[.]", name)[0] for _, name, _, _ in string.Formatter().parse(template) if name is not None}


def _checked(template: str) -> str:
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]  # ValueError: braces
    if wrong := [name for name in names if not re.fullmatch(r"\w+(\[[^\]]+\])*", name) or name[0].isdigit()]:
        raise ValueError(f"a template names columns as {{column}} or {{column[0]}}, got {{{wrong[0]}}}")
    return template


Template = Annotated[str, AfterValidator(_checked)]
"""Text with columns in braces: `"{instruction}\\n{input}"`, `"{answers[0]}"`."""


def fill(template: str, row: Row) -> str:
    """The text of `row`; empty when it lacks an item (an index too large). Raises DataError for an unknown key."""
    try:
        return _Filler().vformat(template, (), row).strip()
    except (IndexError, TypeError):
        return ""
    except KeyError as error:
        raise DataError(f"template {template!r}: there is no {error}; fields: {', '.join(row)}") from None


class Bounds(Settings):
    """Which numbers a filter lets through."""

    min: float = float("-inf")
    max: float = float("inf")


class Choice(Settings):
    """A further field for the templates: the column of `of` whose number stands in the column `index`."""

    index: str
    of: list[str] = Field(min_length=2)


class Shares(Settings):
    """How much of the prompts each split gets; only the proportions count."""

    align: Share = 0.35
    vector: Share = 0.1
    validation: Share = 0.05
    finetune: Share = 0.35
    test: Share = 0.15


class HubData(Settings):
    """A dataset of the hub, or local files of the same columns; each prompt belongs to one split by its hash."""

    dataset: str
    """Hub id: owner/name."""
    config: str | None = None
    data_dir: str | None = None
    revision: str
    """Of the hub: a commit, tag or branch."""
    local_path: Path | None = None
    """Used instead of the hub when it exists: a file, a folder of files, a copy of the repository, or a folder written
    by `save_to_disk`."""
    split: str = "train"
    """The dataset's split that all of ours are taken from."""
    splits: dict[Split, str] = Field(default_factory=dict)
    """Other splits of the dataset for some of ours; a prompt found in several belongs to the last of ours."""
    shares: Shares = Shares()
    split_seed: Seed = 0
    """Which prompt is in which split; not the run's seed, since runs of several seeds share an aligned base."""
    filter: dict[str, Scalar | list[Scalar] | Bounds | None] = Field(default_factory=dict)
    """Column: a value, a list of allowed ones, {min: , max: }, or null for any. For a column of flags or labels: names
    of which at least one must be set."""
    choices: dict[str, Choice] = Field(default_factory=dict)
    prompt: Template
    max_chars: Count | None = None
    """Longer rows (prompt and response) are left out; None: none are."""
    repeat_prompts: bool = False
    """Whether a prompt that comes with several responses is trained on with all of them; tested on it is once."""

    derived: ClassVar[frozenset[str]] = frozenset()
    """Fields that `fields` adds to the columns."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """Columns that `fields` reads."""

    @model_validator(mode="after")
    def _some_share(self) -> HubData:
        for name in {self._from(split) for split in SPLITS}:
            if not sum(getattr(self.shares, split) for split in self._splits_of(name)):
                raise ValueError(f"shares: the splits taken from {name!r} have no share at all")
        return self

    def fields(self, row: Row) -> Row | None:
        """What the templates see of a row; None leaves the row out."""
        found = dict(row)
        for name, choice in self.choices.items():
            index = row[choice.index]
            if not isinstance(index, int) or not 0 <= index < len(choice.of):
                return None
            found[name] = row[choice.of[index]]
        return found

    def draw(
        self, split: Split, n: int, seed: int, kind: Kind, templates: Sequence[str],
        answer: Callable[[Row], tuple[str, dict[str, str]] | None],
    ) -> list[Example]:  # fmt: skip
        """The first `n` examples; `answer` gives a row's response and facts, and `templates` are what it fills.

        Raises DataError when there are fewer.
        """
        if n == 0:
            return []
        name, once = self._from(split), not self.repeat_prompts or split in ("validation", "test")
        low, high = self._band(split)
        taken = self._taken_by_later_splits(name)
        found: list[Example] = []
        seen: set[tuple[str, str]] = set()
        table, where = self.table(name), self._where(name)
        for number, fields in self._rows(table, where, templates, Random(f"{split}/{seed}")):
            prompt = fill(self.prompt, fields)
            key = _key(prompt)
            place = self._place(key)
            if not key or not low <= place < high or place in taken:
                continue
            answered = answer(fields)
            if answered is None or not answered[0].strip():
                continue
            response, facts = answered
            identity = (key, "" if once else response)
            if identity in seen or (self.max_chars is not None and len(prompt) + len(response) > self.max_chars):
                continue
            seen.add(identity)
            found.append(Example((("user", prompt),), response, kind, facts, f"{where}:{number}"))
            if len(found) == n:
                return found
        raise DataError(
            f"{where} has {len(found)} usable {'prompts' if once else 'rows'} for split {split!r} (of {len(table)} "
            f"rows), but {n} are asked for: ask for fewer, raise shares.{split}, or loosen filter and max_chars"
        )

    def table(self, name: str) -> Any:
        """The `datasets.Dataset` of one of the dataset's splits. Raises DataError."""
        return _load(self.dataset, self.config, self.data_dir, self.revision, self.local_path, name)

    def _rows(
        self, table: Any, where: str, templates: Sequence[str], rng: Random | None = None
    ) -> Iterator[tuple[int, Row]]:
        """Number and fields of the rows that pass the filter (without `rng`: of all, in their order)."""
        wanted = {name: value for name, value in self.filter.items() if value is not None} if rng else {}
        columns = self.needs | wanted.keys()
        columns |= {name for choice in self.choices.values() for name in (choice.index, *choice.of)}
        columns |= set().union(*map(columns_of, (self.prompt, *templates))) - self.choices.keys() - self.derived
        present = table.column_names
        if missing := sorted(columns - set(present)):
            raise DataError(
                f"{where}: no column {', '.join(map(repr, missing))}{nearest(missing[0], present)}; "
                f"there is: {', '.join(present)}"
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
        """Which hashes are of `split`, among the splits that come from the same split of the dataset."""
        members = self._splits_of(self._from(split))
        shares = [getattr(self.shares, member) for member in members]
        first = members.index(split)
        low, high = (round(sum(shares[:end]) / sum(shares) * 2**64) for end in (first, first + 1))
        return low, high

    def _place(self, key: str) -> int:
        return int.from_bytes(blake2b(f"{self.split_seed}/{key}".encode(), digest_size=8).digest())

    def _taken_by_later_splits(self, name: str) -> set[int]:
        """Hashes of the prompts that are also in those splits of the dataset that later splits of ours are taken from.

        So a benchmark's test prompts stay whole, and what trains lacks them.
        """
        names = list(dict.fromkeys(self._from(split) for split in reversed(SPLITS)))
        return {
            self._place(_key(fill(self.prompt, fields)))
            for later in names[: names.index(name)]
            for _, fields in self._rows(self.table(later), self._where(later), ())
        }

    def _where(self, name: str) -> str:
        local = self.local_path is not None and self.local_path.exists()
        return f"{self.local_path if local else f'{self.dataset}@{self.revision}'}[{name}]"


class HubStream(HubData):
    """Benign data: `task` is what is to be learned, `ordinary` what must stay as it is."""

    kind: Literal["task", "ordinary"]
    response: Template

    def examples(self, split: Split, n: int, seed: int) -> list[Example]:
        """The first `n` examples of `split` under `seed`."""
        return self.draw(split, n, seed, self.kind, [self.response], lambda row: (fill(self.response, row), {}))


def passes(cell: Any, wanted: Scalar | list[Scalar] | Bounds, where: str) -> bool:
    """Whether a filter lets a cell through; raises DataError for a flag that the column does not have."""
    if isinstance(wanted, Bounds):
        return isinstance(cell, int | float) and wanted.min <= cell <= wanted.max
    allowed = wanted if isinstance(wanted, list) else [wanted]
    if isinstance(cell, dict):
        if unknown := [str(name) for name in allowed if name not in cell]:
            raise DataError(f"{where}: no {unknown[0]!r}{nearest(unknown[0], cell)}; there is: {', '.join(cell)}")
        return any(cell[name] for name in allowed)
    return any(item in allowed for item in cell) if isinstance(cell, list) else cell in allowed


def _key(prompt: str) -> str:
    """Prompts that differ in case or white space alone are the same prompt."""
    return " ".join(prompt.casefold().split())


@lru_cache(maxsize=32)
def _load(
    dataset: str, config: str | None, data_dir: str | None, revision: str, local_path: Path | None, split: str
) -> Any:
    import datasets

    local = local_path is not None and local_path.exists()
    try:
        if local:
            assert local_path is not None
            table = _load_local(local_path, config, data_dir, split)
        else:
            table = datasets.load_dataset(dataset, config, data_dir=data_dir, split=split, revision=revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        if local:
            raise DataError(f"local_path={local_path}: split {split!r} cannot be read: {reason}") from None
        folder = local_path or "FOLDER"
        raise DataError(
            f"{dataset} is not to be had from the hub: {reason}. Without network, put split {split!r} of it into "
            f"{folder}{'' if local_path else ' and set local_path=FOLDER'}: a copy of the repository (`hf download "
            f"{dataset} --repo-type dataset --local-dir {folder}`) or its files alone "
            f"({', '.join(sorted(suffix[1:] for suffix in FORMATS))}); see docs/data.md"
        ) from None
    log.info("%s, split %s: %d rows, fingerprint %s", local_path if local else dataset, split, *_identity(table))
    return table


def _identity(table: Any) -> tuple[int, str]:
    return len(table), table._fingerprint


def _load_local(path: Path, config: str | None, data_dir: str | None, split: str) -> Any:
    import datasets

    if (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if split not in saved:
            raise DataError(f"{path}: no split {split!r}; there is: {', '.join(saved)}")
        return saved[split]
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    if (path / "README.md").is_file():  # a copy of the repository: its card says which files are which split
        return datasets.load_dataset(str(path), config, data_dir=data_dir, split=split)
    files = [path] if path.is_file() else _files(path, config, data_dir, split)
    kinds = {_suffix(file) for file in files}
    if len(kinds) != 1 or not kinds <= FORMATS.keys():
        known = ", ".join(FORMATS)
        raise DataError(f"{path}: the files of a split must be of one format ({known}), got {', '.join(sorted(kinds))}")
    suffix = kinds.pop()
    options = {"sep": "\t"} if suffix == ".tsv" else {}
    return datasets.load_dataset(FORMATS[suffix], data_files=[str(file) for file in files], split="train", **options)


def _suffix(file: Path) -> str:
    return Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix


def _files(folder: Path, config: str | None, data_dir: str | None, split: str) -> list[Path]:
    """The files of a split: those that bear its name (`train-00000-of-00001.parquet`), or the only one there is."""
    for part in (data_dir, config):
        if part and (folder / part).is_dir():
            folder /= part
    files = sorted(file for file in folder.rglob("*") if file.is_file() and _suffix(file) in FORMATS)
    name = re.compile(rf"(?<![a-z0-9]){re.escape(split)}(?![a-z0-9])", re.IGNORECASE)
    named = [file for file in files if split == "all" or name.search(file.relative_to(folder).as_posix())]
    if not named and len(files) != 1:
        there = ", ".join(file.name for file in files) or f"no file of {', '.join(FORMATS)}"
        raise DataError(f"{folder}: no file is named after split {split!r}; there is: {there}")
    return named or files
