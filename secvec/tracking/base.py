"""The calls that every tracker takes, and several trackers as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Cell = str | float | bool | None
Record = Mapping[str, Any]
"""A run's record, as in record.json."""


@dataclass(frozen=True)
class Artifact:
    """What a run took in or left: its facts, never training text; weights only where `files` says so."""

    name: str
    """Ends in a hash of the content: the same artifact of two runs has one name."""
    kind: str
    about: str
    facts: Mapping[str, Any]
    made_from: tuple[str, ...] = ()
    """Names of the artifacts that it comes from: the lineage, also where a tracker cannot draw it."""
    taken_in: bool = False
    """Whether the run started from it; otherwise it made it."""
    files: tuple[Path, ...] = ()
    """Sent with it."""


class Tracker:
    """Takes what a run sends. The base takes it and drops it."""

    keeps_artifacts = False
    """Whether `artifact` is of any use: to describe a backbone takes reading all of it."""

    def open(self, record: Record) -> None:
        """The run begins; `record` has its config and identity."""

    def begin_stage(self, stage: str, resumed: bool) -> None:
        """Curves of `stage` follow; those of an earlier try that this one does not go on from are dropped."""

    def curves(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Values by name after optimizer step `step` of `stage`."""

    def outcomes(self, values: Mapping[str, float]) -> None:
        """What was measured once, or anew: values by the names that the record gives them."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """A table."""

    def artifact(self, artifact: Artifact) -> None:
        """Something that the run took in or made."""

    def close(self, record: Record) -> None:
        """The run has ended, well or not: `record` says which, and why."""


class Trackers(Tracker):
    """Several trackers, each of which gets every call."""

    def __init__(self, trackers: Sequence[Tracker]):
        self.trackers = trackers
        self.keeps_artifacts = any(tracker.keeps_artifacts for tracker in trackers)

    def open(self, record: Record) -> None:
        """To all."""
        for tracker in self.trackers:
            tracker.open(record)

    def begin_stage(self, stage: str, resumed: bool) -> None:
        """To all."""
        for tracker in self.trackers:
            tracker.begin_stage(stage, resumed)

    def curves(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """To all."""
        for tracker in self.trackers:
            tracker.curves(stage, step, values)

    def outcomes(self, values: Mapping[str, float]) -> None:
        """To all."""
        for tracker in self.trackers:
            tracker.outcomes(values)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """To all."""
        for tracker in self.trackers:
            tracker.table(name, columns, rows)

    def artifact(self, artifact: Artifact) -> None:
        """To all."""
        for tracker in self.trackers:
            tracker.artifact(artifact)

    def close(self, record: Record) -> None:
        """To all."""
        for tracker in self.trackers:
            tracker.close(record)


def searchable(config: Any) -> Any:
    """`config`, its lists of mappings as mappings by index: each value has a dotted name, as `data.benign.0.name`."""
    if isinstance(config, Mapping):
        return {key: searchable(value) for key, value in config.items()}
    if isinstance(config, list) and any(isinstance(item, Mapping) for item in config):
        return {str(number): searchable(item) for number, item in enumerate(config)}
    return config


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of `searchable(config)` by their dotted names."""
    if not isinstance(config, Mapping):
        return {prefix: config}
    found: dict[str, Any] = {}
    for key, value in searchable(config).items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found
