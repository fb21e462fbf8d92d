"""The interface of a tracker, and several trackers as one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secvec.runs.record import Record

Cell = str | float | bool | None


@dataclass(frozen=True)
class Artifact:
    """What a run used or made: facts about it, and `files`; never training text."""

    name: str
    """Ends in a hash of the content, so that two runs give the same artifact the same name."""
    kind: str
    about: str
    facts: Mapping[str, Any]
    made_from: tuple[str, ...] = ()
    """Names of the artifacts that it was made from."""
    used: bool = False
    """Whether the run used it; otherwise the run made it."""
    files: tuple[Path, ...] = ()
    """Files to send with it."""


class Tracker:
    """Receives the numbers of a run. This one drops them."""

    keeps_artifacts = False
    """Whether `artifact` does anything. To describe a backbone takes reading all of it."""
    num_predictions = 0
    """Answers of each phase and kind of prompt in the table of predictions; 0: no table."""

    def open(self, record: Record) -> None:
        """Begins a run; `record` has its config."""

    def begin_stage(self, stage: str, resumed: bool) -> None:
        """Begins the curves of `stage`; unless `resumed`, those of an earlier try are dropped."""

    def curves(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Takes values by name, after optimizer step `step` of `stage`."""

    def outcomes(self, values: Mapping[str, float]) -> None:
        """Takes values that are measured once, by their names in the record; a new value replaces the old one."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Takes a table."""

    def artifact(self, artifact: Artifact) -> None:
        """Takes what the run used or made."""

    def close(self, record: Record) -> None:
        """Ends the run; `record` has its status and error."""


def _to_each(name: str) -> Callable[..., None]:
    def call(self: Trackers, *args: Any) -> None:
        for tracker in self.trackers:
            getattr(tracker, name)(*args)

    return call


class Trackers(Tracker):
    """Several trackers as one: each gets every call."""

    def __init__(self, *trackers: Tracker):
        self.trackers = trackers

    open, begin_stage, curves, outcomes = map(_to_each, ("open", "begin_stage", "curves", "outcomes"))
    table, artifact, close = map(_to_each, ("table", "artifact", "close"))


def searchable(config: Any) -> Any:
    """`config` with each list of mappings as a mapping by index, so that every value has a dotted name."""
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
