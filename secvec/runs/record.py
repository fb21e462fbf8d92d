"""The record of a run, record.json on disk: what it was, how it ended, what it measured. Needs no torch."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator, model_validator

from secvec.errors import DataError
from secvec.metrics import Measurement
from secvec.runs.content import mapped
from secvec.runs.files import write_atomic

SCHEMA = 1
FILE = "record.json"
UNKNOWN = "unknown"
REMEDY = "fix it, or delete the run folder and run it again"
PACKAGES = ("secvec", "torch", "lightning", "hydra-core", "transformers", "peft", "tokenizers", "safetensors")


class DataSummary(BaseModel):
    """Hash of the data of each split, and the number of its examples by kind."""

    sha256: dict[str, str] = {}
    counts: dict[str, dict[str, int]] = {}


class Weights(BaseModel):
    """A saved model: its folder, and a fingerprint of its weights."""

    folder: str
    fingerprint: str


PARTS_OF_STAGES = ("evaluation", "during", "training")
"""Seconds that are a part of the stages' own: all evaluation, that during the fine-tune, and the last fine-tune itself,
in the run that made it (a later run may copy its result)."""


class Record(BaseModel):
    """Everything that a run says of itself. Fields that are not known here are kept."""

    model_config = ConfigDict(extra="allow")

    run: str = "unnamed"
    """Name of its folder."""
    key: str = ""
    """Of all settings that change results; empty where a run failed before it had one."""
    stage: str = UNKNOWN
    defense: str = UNKNOWN
    needs: list[str] = []
    """What the defense needs beyond the plain fine-tune: the price of its result."""
    behavior: str = UNKNOWN
    model: str = UNKNOWN
    tune: str = UNKNOWN
    seed: int | None = None
    """None: a run that failed on its settings."""
    generation: dict[str, Any] = {}
    """The engine that writes responses, with its version and settings."""
    overrides: list[str] = []
    config: dict[str, Any] = {}
    """The whole validated config."""
    status: Literal["running", "completed", "failed"] = "running"
    error: str | None = None
    created: str | None = None
    versions: dict[str, str] = {}
    commit: str | None = None
    dirty: bool = False
    """Whether the source had changes that are in no commit."""
    base: Weights | None = None
    """The starting model."""
    backbone: Weights | None = None
    """The saved model that was evaluated."""
    stages: list[str] = []
    """Stages that ended well."""
    data: DataSummary = DataSummary()
    wall_seconds: dict[str, float] = {}
    """Of each stage, and of PARTS_OF_STAGES."""
    peak_bytes: dict[str, int] = {}
    """Most memory that the first process has held: `host`, and `gpu` where there is one."""
    checkpoint_bytes: dict[str, int] = {}
    """Training -> bytes of all checkpoints that were written for it, since it last began or went on."""
    processes: dict[str, int] = {}
    """Stage -> how many processes ran it."""
    metrics: dict[str, Measurement] = {}
    """By names as `after/behavior_rate`; see secvec/metrics.py."""
    ledger: dict[str, list[int | bool]] = {}
    """Part of the model -> number of parameters, of those that are trained, whether it is active."""

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, given: Any) -> Any:
        """Drops nulls. A run that failed on its settings may not know its defense or seed, a completed one must."""
        if not isinstance(given, Mapping):
            return given
        known = {name: value for name, value in given.items() if value is not None}
        for name, kind in (("defense", str), ("seed", int)):
            if not isinstance(known.get(name), kind):
                if known.get("status") == "completed":
                    raise ValueError(f"`{name}` should be {kind.__name__}, it is {known.get(name)!r}")
                known.pop(name, None)
        return known

    @field_validator("metrics", mode="before")
    @classmethod
    def _numbers(cls, given: Any) -> Any:
        """JSON has no NaN: a value that is no number is null there."""
        if not isinstance(given, Mapping):
            return given
        return {
            name: {**one, "value": math.nan} if isinstance(one, Mapping) and one.get("value") is None else one
            for name, one in given.items()
        }

    @classmethod
    def read(cls, path: Path) -> Record:
        """The record in a file. Raises DataError that names the file, the line or field, and the remedy."""
        return cls.parse(read_json(path), path)

    @classmethod
    def parse(cls, found: Any, path: Path) -> Record:
        """The record in a JSON value of the file `path`. Raises DataError."""
        if not isinstance(found, dict):
            raise DataError(f"{path}: line 1: a record is a JSON object, this is a {type(found).__name__}; {REMEDY}")
        if found.get("schema") != SCHEMA:
            raise DataError(f"{path}: schema is {found.get('schema')!r}, this version of secvec reads schema {SCHEMA}")
        try:
            return cls(**{name: value for name, value in found.items() if name != "schema"})
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            what = f"`{field}`: {first['msg']}, it is {first['input']!r}" if field else str(first["ctx"]["error"])
            raise DataError(f"{path}: {what}; {REMEDY}") from None

    @classmethod
    def find(cls, folder: Path) -> Record | None:
        """The record of a run folder; None where there is none that can be read."""
        try:
            return cls.read(folder / FILE)
        except (OSError, DataError):
            return None

    def write(self, path: Path) -> None:
        """Writes record.json, whole or not at all."""
        write_atomic(path, self.as_json(indent=1) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """As in record.json: plain values, and no field that is None."""
        fields = self.model_dump().items()
        return {"schema": SCHEMA, **{name: value for name, value in fields if value is not None}}

    def as_json(self, indent: int | None = None) -> str:
        """As in record.json; NaN and infinities are null."""
        try:
            return json.dumps(self.as_dict(), indent=indent, ensure_ascii=False, allow_nan=False, default=str)
        except ValueError:
            return json.dumps(mapped(self.as_dict(), _finite), indent=indent, ensure_ascii=False, default=str)


def read_json(path: Path) -> Any:
    """The JSON value in a file, NaN and infinities as null. Raises DataError with the line of what is wrong."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except json.JSONDecodeError as error:
        where = f"{path}: line {error.lineno}, column {error.colno}"
        raise DataError(f"{where}: not valid JSON ({error.msg}); {REMEDY}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(f"{path}: line {line}: not UTF-8 text ({error.reason}); {REMEDY}") from error


def record_failure(folder: Path, error: str, known: Record) -> Record:
    """Writes that the run in `folder` failed, for a process that could not do so itself, and returns the record.

    What the folder's record says stays; `known` stands where there is none.
    """
    record = Record.find(folder) or known
    record.run, record.status, record.error = folder.name, "failed", error
    record.write(folder / FILE)
    return record


def provenance() -> dict[str, Any]:
    """Versions of the packages that shape results, and the commit of the source, if it is a git checkout."""

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        if not shutil.which("git"):
            return None
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    return {
        "versions": {name: version(name) for name in PACKAGES},
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
