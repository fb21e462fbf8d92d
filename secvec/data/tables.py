"""Tables of rows: files, folders and datasets of the hub. Text files are read here, all else by `datasets`."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from secvec.errors import DataError, nearest
from secvec.runs.content import file_digest, folder_digest
from secvec.runs.files import files_in
from secvec.runs.keys import content_key

log = logging.getLogger(__name__)

BINARY = {".parquet": "parquet", ".arrow": "arrow"}
FORMATS = {**BINARY, ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
COMPRESSED = (".gz", ".xz", ".zst", ".bz2")
OPENERS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
SAVED, SAVED_SPLIT = "dataset_dict.json", "state.json"
LAYOUTS = (SAVED, SAVED_SPLIT, "README.md")
"""Files by which `datasets` knows what else is in a folder: those of `save_to_disk`, or the card of a repository."""
WHOLE = re.compile(r"0|-?[1-9]\d{0,17}")
"""A whole number that is shown as it was written."""
ROW = 'a row is an object like {"prompt": ..., "response": ...}'

csv.field_size_limit(sys.maxsize)  # the default refuses long texts


def _is_source(given: str) -> str:
    path = Path(given).expanduser()
    if path.exists():
        return str(path)
    owner = given.partition("/")[0]
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?", given) and _suffix(path) not in FORMATS and not Path(owner).exists():
        return given
    there = (
        [str(path.parent / file.name) for file in path.parent.iterdir() if file.exists()]
        if path.parent.is_dir()
        else []
    )
    raise ValueError(f"no such file or folder: {given}{nearest(str(path), there)}; a dataset of the hub is OWNER/NAME")


Source = Annotated[str, BeforeValidator(str), AfterValidator(_is_source)]
"""Rows: a file or folder that `datasets` reads, or the split `train` of a dataset of the hub, OWNER/NAME[@REVISION]."""


def rows_of(source: str) -> Iterator[tuple[str, Any]]:
    """Place (`file:line`, `file:row n`) and content of each row; a row that cannot be read comes as a DataError."""
    path = Path(source)
    files = _files_of(path, None, None, "train")
    texts = bool(files) and all(_suffix(file) not in BINARY for file in files)
    if texts and (path.is_file() or all(file.suffix != ".zst" for file in files)):
        for file in files:  # by any other name a file is JSON
            yield from _csv_rows(file) if _delimiter(file) else _json_rows(file)
        return
    try:
        if files:
            table = _load_files(path, files)
        elif path.exists():
            table = _load_local(path, None, None, "train")
        else:
            name, _, revision = source.partition("@")
            table = load(name, None, None, revision or "main", None, "train")
    except _faults() as error:
        raise DataError(f"{source}: cannot be read: {_reason(error)}") from None
    for number, row in enumerate(table, start=1):
        yield f"{source}:row {number}", row


def stamp(path: Path) -> Any:
    """What changes with any file of a path; None where there is none. ctime is a time that no program can set back."""
    files = [path] if path.is_file() else files_in(path)
    seen = [(file, file.stat()) for file in files]
    return tuple((str(file), s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for file, s in seen) or None


def _bytes(path: Path) -> bytes:
    if path.suffix in (*COMPRESSED, ".zip") and path.suffix not in OPENERS:
        raise DataError(f"{path}: {path.suffix} cannot be read here: unpack it, or pack it as {', '.join(OPENERS)}")
    try:
        with OPENERS.get(path.suffix, Path.open)(path, "rb") as file:  # type: ignore[call-arg]
            content: bytes = file.read()
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return content.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of some editors


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows of one array, or one on each line."""
    content = _bytes(path)
    if content[:99].lstrip().startswith(b"["):
        rows = _json(content)
        if isinstance(rows, DataError):
            raise DataError(f"{path}: {rows}")
        yield from ((f"{path}:row {number}", row) for number, row in enumerate(rows, start=1))
        return
    if content.count(b"\n") > 1 and isinstance(_json(content.split(b"\n", 1)[0]), DataError):
        whole = _json(content)  # one object over several lines would be a fault in each of them
        if isinstance(whole, dict):
            raise DataError(
                f"{path}: the file is one object ({', '.join(whole)[:99]}): a file is one row a line, or one array of "
                "rows. Save the rows alone, as an array"
            )
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", _json(line)


def _json(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 (byte {error.start}); save the file as UTF-8")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        return DataError(
            f"broken JSON at {line}column {error.colno}: {error.msg}; a file is one row a line, or one array (those of "
            f"other formats end with {', '.join(sorted(FORMATS.keys() - {'.json', '.jsonl'}))})"
        )
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        return DataError(f"JSON that cannot be read: {error}")


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows below a header; every cell is text."""
    try:
        text = _bytes(path).decode("utf-8")
        delimiter = _delimiter(path)
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        if twice := [name for name, n in Counter(reader.fieldnames or ()).items() if n > 1]:
            raise DataError(f"{path}: {len(twice)} names of columns occur twice ({twice[0]!r}): give each its own")
        for number, row in enumerate(reader, start=1):
            fault = ""
            if None in row or None in row.values():
                fault = f"the row does not have {len(reader.fieldnames or ())} cells, as the header has"
            elif delimiter == "\t" and any(re.search("[\t\n]", cell) for cell in row.values()):
                fault = (
                    f"a cell begins with a quotation mark and ends in line {reader.line_num}, at the next one: double "
                    "the marks that are text, or save the file as csv"
                )
            yield f"{path}:row {number}", DataError(fault) if fault else row
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}: broken table after line {reader.line_num}: {error}") from None


def _faults() -> tuple[type[Exception], ...]:
    import datasets

    return OSError, ValueError, datasets.exceptions.DatasetsError


def _reason(error: Exception) -> str:
    # what pyarrow and `datasets` say of a file without rows
    if any(words in str(error) for words in ("BatchSize must be greater than 0", "corresponds to no data")):
        return "it has no rows"
    return str(error.__cause__ or error).strip().split("\n")[0]


def load(
    dataset: str, config: str | None, data_dir: str | None, revision: str, local_path: Path | None, split: str
) -> Any:
    """A split of a dataset, from `local_path` where that exists, else from the hub. Raises DataError."""
    return _load(dataset, config, data_dir, revision, local_path, split, local_path and stamp(local_path))


@lru_cache(maxsize=32)
def _load(
    dataset: str,
    config: str | None,
    data_dir: str | None,
    revision: str,
    local_path: Path | None,
    split: str,
    stamp: Any,
) -> Any:
    import datasets

    local = local_path is not None and local_path.exists()
    try:
        if local:
            assert local_path is not None
            table = _load_local(local_path, config, data_dir, split)
        else:
            table = datasets.load_dataset(dataset, config, data_dir=data_dir, split=split, revision=revision)
    except _faults() as error:
        reason = _reason(error)
        if local:
            raise DataError(f"local_path={local_path}: split {split!r} cannot be read: {reason}") from None
        folder = local_path or "FOLDER"
        raise DataError(
            f"{dataset} cannot be loaded from the hub: {reason}. Without network, put split {split!r} of it into "
            f"{folder}{'' if local_path else ' and set local_path=FOLDER'}: a copy of the repository (`hf download "
            f"{dataset} --repo-type dataset --local-dir {folder}`) or its files alone "
            f"({', '.join(sorted(suffix[1:] for suffix in FORMATS))}); see docs/data.md"
        ) from None
    shown = local_path if local else dataset, split, len(table), table._fingerprint
    log.info("%s, split %s: %d rows, fingerprint %s", *shown)
    return table


def _load_local(path: Path, config: str | None, data_dir: str | None, split: str) -> Any:
    import datasets

    if files := _files_of(path, config, data_dir, split):
        return _load_files(path, files)
    if (path / SAVED).is_file():
        saved = datasets.load_from_disk(str(path))
        if split not in saved:
            raise DataError(f"{path}: no split {split!r}; available: {', '.join(saved)}")
        return saved[split]
    if (path / SAVED_SPLIT).is_file():
        return datasets.load_from_disk(str(path))
    kept = _kept_by([folder_digest(path)])  # a copy of the repository: its card names the files of each split
    return datasets.load_dataset(str(path), config, data_dir=data_dir, split=split, cache_dir=kept)


def _load_files(path: Path, files: list[Path]) -> Any:
    """The rows of `files`, which are of one format, with each text as it stands there. `path` is for errors."""
    import datasets

    kinds = {_suffix(file) for file in files}
    if len(kinds) != 1 or not kinds <= FORMATS.keys():
        known = ", ".join(FORMATS)
        raise DataError(f"{path}: the files of a split must be of one format ({known}), got {', '.join(sorted(kinds))}")
    kind, paths = FORMATS[kinds.pop()], [str(file) for file in files]
    options: dict[str, Any] = {}
    if kind == "csv":  # a cell is text: an answer may be 007, true or None
        options = {"sep": _delimiter(files[0]), "keep_default_na": False}
        first = datasets.load_dataset("csv", data_files=paths[:1], split="train", streaming=True, **options)
        names = [name for row in first.take(1) for name in row]
        options["features"] = datasets.Features(dict.fromkeys(names, datasets.Value("string"))) if names else None
    options["cache_dir"] = _kept_by([file_digest(file) for file in files])
    table = datasets.load_dataset(kind, data_files=paths, split="train", **options)
    if kind == "csv":
        return _with_numbers(table)
    return _with_texts(table, files) if kind == "json" else table


def _with_numbers(table: Any) -> Any:
    """`table` of a csv, with the columns that hold whole numbers alone as numbers: a template may choose by them."""
    import datasets

    def cells(name: str) -> Iterator[str]:
        for part in table.select_columns(name).iter(1000):
            yield from (cell or "" for cell in part[name])

    for name in table.column_names:
        if all(map(WHOLE.fullmatch, cells(name))):
            table = table.cast_column(name, datasets.Value("int64"))
    return table


def _with_texts(table: Any, files: list[Path]) -> Any:
    """`table` of JSON, with the texts that were read as times."""
    times = ("timestamp", "date", "time")
    if read := [name for name, of in table.features.items() if getattr(of, "dtype", "").startswith(times)]:
        rows = [row for file in files for _, row in _json_rows(file)]
        for name in read:
            table = table.remove_columns(name).add_column(name, [row.get(name) for row in rows])
    return table


def _kept_by(digests: list[str]) -> str:
    """Where `datasets` keeps its copy of local files: it knows them by path and time alone, and not by content."""
    import datasets

    return str(Path(datasets.config.HF_DATASETS_CACHE) / "local" / content_key(digests))


OF_SPLITS = re.compile(r"(?<![a-z0-9])(train|test|val|valid|validation|dev|eval)(?![a-z0-9])", re.IGNORECASE)
"""Names that datasets have for their splits."""


def _suffix(file: Path) -> str:
    return (Path(file.stem).suffix if file.suffix in COMPRESSED else file.suffix).lower()


def _delimiter(file: Path) -> str:
    """Between the cells of a csv or tsv file; empty for other files."""
    return {".csv": ",", ".tsv": "\t"}.get(_suffix(file), "")


def _files_of(path: Path, config: str | None, data_dir: str | None, split: str) -> list[Path]:
    """The files of a split; none where there is no such path, or where `datasets` knows what is in the folder."""
    if path.is_file():
        return [path]
    if not path.is_dir() or any((path / name).is_file() for name in LAYOUTS):
        return []
    return _files(path, config, data_dir, split)


def _files(folder: Path, config: str | None, data_dir: str | None, split: str) -> list[Path]:
    """The files of a split: those named after it (`train-00000-of-00001.parquet`), or the only file there is."""
    for part in (data_dir, config):
        if part and (folder / part).is_dir():
            folder /= part
    files = [file for file in files_in(folder) if _suffix(file) in FORMATS]
    name = re.compile(rf"(?<![a-z0-9]){re.escape(split)}(?![a-z0-9])", re.IGNORECASE)
    named = [file for file in files if split == "all" or name.search(file.relative_to(folder).as_posix())]
    others = [file for file in files if OF_SPLITS.search(file.relative_to(folder).as_posix())]
    if not files or (not named and others):
        there = ", ".join(file.name for file in files) or f"no file of {', '.join(FORMATS)}"
        raise DataError(
            f"{folder}: no file is named after split {split!r}; found: {there}. Name the files of that split as "
            f"{split}-1{files[0].suffix if files else '.jsonl'}, or give one file"
        )
    if named and (unread := [file.name for file in files if file not in named and file not in others]):
        log.warning("%s: only the files of split %r are read, not %s", folder, split, ", ".join(unread[:8]))
    return named or files  # no name says anything of splits: they are the rows
