"""Which runs belong together: everything but the seed is equal within a group."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from secvec.metrics import OF_RUN, VECTOR_ONLY, metric_of, qualified
from secvec.report.estimate import Estimate, estimate
from secvec.report.records import Run
from secvec.runs.content import OF_ROWS
from secvec.runs.keys import ignores_vector

# Settings that say where or how a run is kept, not what it does.
_IGNORED = re.compile(
    r"runs?|run_(name|id|dir)|stages?|experiment(_name)?|hydra|(.*_)?(dirs?|roots?|files?)|(?!name_or_)(.*_)?paths?"
    r"|out(put)?s?|output_.*|logg(er|ers|ing)|wandb|tensorboard|tracking|telemetry|sweep|overwrite|resume|force|num_(workers|threads)"
)
_DATA = ("behavior", "data", "vector")
_FILES = (*OF_ROWS, "test_file", "kl_file", "local_path", "path")
"""Settings of data that name files or datasets."""
_OF_SEED = re.compile(r"-s\d+-[0-9a-f]{8}$")  # in a run folder's name
_encode = json.JSONEncoder(sort_keys=True).encode
WITH_VECTOR = ("vector_on", "vector_off", "active")
_FIELDS = ("behavior", "model", "tune")


@dataclass(frozen=True)
class Group:
    """A column of the tables: the runs whose metrics under `phase` are averaged ("base" or "after").

    `values` are JSON texts, one for each of the comparison's keys; "" where the runs have no such setting.
    """

    label: str
    runs: tuple[Run, ...]
    phase: str = "after"
    values: tuple[str, ...] = ()
    _estimates: dict[tuple[str, str], Estimate | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def defense(self) -> str:
        """The defense that the group's runs share."""
        return self.runs[0].defense

    @property
    def scope(self) -> tuple[str, str]:
        """Behavior and model: base values and floors may be compared only within one scope."""
        return self.runs[0].record.behavior, self.runs[0].model

    @cached_property
    def setting(self) -> dict[str, str]:
        """All that the group's runs share besides the defense."""
        return {key: value for key, value in _settings(self.runs[0]).items() if key.split(".")[0] != "defense"}

    @property
    def without_vector(self) -> dict[str, str]:
        """`setting`, but for the settings of the vector: a defense that uses none has no such settings."""
        return {key: value for key, value in self.setting.items() if key.split(".")[0] != "vector"}

    @cached_property
    def has_vector(self) -> bool:
        """Whether a vector was on in any run."""
        return any(run.has_vector for run in self.runs)

    def estimate(self, name: str, phase: str | None = None) -> Estimate | None:
        """The mean over seeds of metric `name` in `phase` (default: the group's own)."""
        key = name, phase or self.phase
        if key not in self._estimates:
            self._estimates[key] = self._measure(*key)
        return self._estimates[key]

    def _measure(self, name: str, phase: str) -> Estimate | None:
        if phase == "base" and name in OF_RUN:
            return None
        if not self.has_vector and (phase in WITH_VECTOR or name in VECTOR_ONLY):
            return None  # what is recorded compares the model with itself
        key = qualified(phase, name)
        metric = metric_of(name)
        pairs = [(run.seed, found) for run in self.runs if (found := run.measurement(key))]
        return estimate(pairs, metric) if metric else None


@dataclass(frozen=True)
class Comparison:
    """Base columns (one for each behavior and model), groups, and the settings in which the groups differ."""

    bases: tuple[Group, ...]
    groups: tuple[Group, ...]
    keys: tuple[str, ...]

    @property
    def columns(self) -> tuple[Group, ...]:
        """The columns of the tables: bases, then groups."""
        return *self.bases, *self.groups

    @property
    def defenses(self) -> list[str]:
        """In the order of the groups: `none` first."""
        return list(dict.fromkeys(group.defense for group in self.groups))

    def floor(self, group: Group) -> Estimate | None:
        """Behavior loss that fine-tuning without a defense reaches on the same behavior and model, nats/token."""
        runs = tuple(r for g in self.groups if g.defense == "none" and g.scope == group.scope for r in g.runs)
        return Group("floor", runs).estimate("behavior_loss") if runs else None


def compare(runs: Iterable[Run]) -> Comparison:
    """Group the completed runs; failed ones are left out."""
    done = [run for run in runs if run.completed]
    settings = {id(run): _settings(run) for run in done}
    keys = _telling_keys(done, settings)
    names = {key: key.rsplit(".", 1)[-1] for key in keys}
    short = {key: name if list(names.values()).count(name) == 1 else key for key, name in names.items()}

    parts: dict[tuple[str, ...], list[Run]] = {}
    for run in done:
        parts.setdefault((run.defense, *(settings[id(run)].get(key, "") for key in keys)), []).append(run)
    order = sorted(parts, key=lambda part: (part[0] != "none", part[0], *map(sortable, part[1:])))
    groups = []
    for part in order:
        settings_shown = [f"{short[key]}={plain(value)}" for key, value in zip(keys, part[1:], strict=True) if value]
        groups.append(Group(" · ".join([part[0], *settings_shown]), tuple(parts[part]), values=part[1:]))

    scopes = list(dict.fromkeys(group.scope for group in groups))
    varying = [i for i in range(2) if len({scope[i] for scope in scopes}) > 1]
    bases = []
    for scope in scopes:
        label = " · ".join(["base", *(f"{_FIELDS[i]}={scope[i]}" for i in varying)])
        bases.append(Group(label, tuple(r for g in groups if g.scope == scope for r in g.runs), "base"))
    return Comparison(tuple(bases), tuple(groups), keys)


def _telling_keys(runs: Sequence[Run], settings: Mapping[int, Mapping[str, str]]) -> tuple[str, ...]:
    """Fewest settings that split the runs of a defense as finely as all settings do; the user's overrides first.

    A key that does not refine the split by the defense and the keys before it is left out.
    """
    chosen = {o.lstrip("+~").split("=", 1)[0] for run in runs for o in run.record.overrides}
    chosen = {key.rpartition("@")[2] for key in chosen}  # GROUP@PLACE=...: what is at the place
    every = {key for of_run in settings.values() for key in of_run}
    # An override of a whole node (scheduler=linear) names the node's choice.
    by_choice = {key: key not in chosen and key.removesuffix(".name") not in chosen for key in every}
    ranked = sorted(every, key=lambda k: (k not in _FIELDS, by_choice[k], k.count("."), k))
    kept: list[str] = []
    parts: list[Any] = [run.defense for run in runs]  # of each run
    for key in ranked:
        finer = [(part, settings[id(run)].get(key, "")) for part, run in zip(parts, runs, strict=True)]
        if len(set(finer)) > len(set(parts)):
            numbers = {part: number for number, part in enumerate(dict.fromkeys(finer))}
            parts = [numbers[part] for part in finer]
            kept.append(key)
    return tuple(kept)


@cache
def _ignored(name: str) -> bool:
    return _IGNORED.fullmatch(name.lower()) is not None


def _settings(run: Run) -> dict[str, str]:
    """Top-level fields and the flattened config as JSON texts, without what is ignored."""
    flat = {name: json.dumps(getattr(run.record, name)) for name in _FIELDS}

    def walk(node: Mapping[str, Any], before: str) -> None:
        for name, value in node.items():
            key = f"{before}{name}"
            if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
                value = {str(number): item for number, item in enumerate(value)}  # as on the command line
            if key == "vector.path" and isinstance(value, str):
                flat[key] = json.dumps(_vector_of(value))
            elif key == "vector" and ignores_vector(run.record.config.get("defense") or {}):
                continue  # the settings of a vector that the defense does not use
            elif key.split(".")[0] in _DATA and name in _FILES and isinstance(value, str):
                flat[key] = json.dumps(Path(value).name)  # other rows; the same file may lie elsewhere
            elif key == "seed" or _ignored(name):  # another seed (model.align.seed) makes another configuration
                continue
            elif isinstance(value, Mapping) and value:
                walk(value, f"{key}.")
            elif key not in flat:
                flat[key] = _encode(value)

    walk(run.record.config, "")
    return flat


def _vector_of(path: str) -> str:
    """Which vector was taken over: its run without seed and key, so that one vector per seed is one setting."""
    folder = path.rstrip("/").removesuffix("/vector")
    return _OF_SEED.sub("", folder.rpartition("/")[2])


def plain(value: str) -> str:
    """A JSON text without the quotes of a string, and whole numbers without `.0`."""
    loaded = json.loads(value)
    return loaded if isinstance(loaded, str) else re.sub(r"(?<=\d)\.0(?=[],]|$)", "", value)


def sortable(value: str) -> tuple[int, float, str]:
    """Numbers by size, then texts."""
    loaded = json.loads(value) if value else ""
    number = isinstance(loaded, (int, float)) and not isinstance(loaded, bool)
    return (0, float(loaded), "") if number else (1, 0.0, value)
