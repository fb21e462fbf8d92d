"""Which runs belong together: everything but the seed is equal within a group."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import combinations
from math import isclose, isfinite
from pathlib import Path
from typing import Any

from secvec.metrics import OF_RUN, VECTOR_ONLY, metric_of, proportion, qualified
from secvec.report.estimate import Estimate, estimate
from secvec.report.records import RecordedRun
from secvec.runs.content import OF_ROWS
from secvec.runs.keys import NOT_IN_KEY, ignores_vector

# Settings that say where or how a run is kept, not what it does.
_IGNORED = re.compile(
    r"runs?|run_(name|id|dir)|stages?|experiment(_name)?|hydra|(.*_)?(dirs?|roots?|files?)|(?!name_or_)(.*_)?paths?"
    r"|out(put)?s?|output_.*|logg(er|ers|ing)|wandb|tensorboard|tracking|telemetry|sweep|overwrite|resume|force|num_(workers|threads)"
)
_PATH = re.compile(r"(?!name_or_)(.*_)?(files?|dirs?|paths?)")
"""The last part of a setting that names a file, as `judge.word_file`."""
_CACHES = ("judge.cache", "answer_judge.cache")
_WITH_FILES = ("behavior", "data", "vector", "model", "judge", "answer_judge", "defense")
"""Parts of the config whose settings may name files, or datasets and parts of them."""
SAME = 1e-3
"""Two values of one metric of a base may differ by this much: another processor rounds otherwise."""
_OF_SEED = re.compile(r"-s\d+-[0-9a-f]{8}$")  # in a run folder's name
_encode = json.JSONEncoder(sort_keys=True).encode
WITH_VECTOR = ("vector_on", "vector_off", "active")
_FIELDS = ("behavior", "model", "tune")


@dataclass(frozen=True)
class Group:
    """A column of the tables: the runs whose metrics under `phase` are averaged ("base" or "after").

    `settings` are those that the runs share. `values` are the ones of the comparison's keys; "" where the runs have no
    such setting. All are JSON texts.
    """

    label: str
    runs: tuple[RecordedRun, ...]
    phase: str = "after"
    values: tuple[str, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
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
        return {key: value for key, value in self.settings.items() if key.split(".")[0] != "defense"}

    @property
    def without_vector(self) -> dict[str, str]:
        """`setting` without the settings of the vector: a defense that uses none has no such settings."""
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
        if pairs and name == "unparsable_rate":  # runs without such a verdict record no rate of them
            others = [run for run in self.runs if not run.measurement(key)]
            asked = [(run.seed, run.measurement(qualified(phase, "behavior_rate"))) for run in others]
            pairs += [(seed, proportion(0, found.n)) for seed, found in asked if found]
        return estimate(pairs, metric) if metric else None


@dataclass(frozen=True)
class Comparison:
    """Base columns, groups, and the settings in which the groups differ.

    There is one base for each behavior and model, or several where other settings make its values others.
    """

    bases: tuple[Group, ...]
    groups: tuple[Group, ...]
    keys: tuple[str, ...]

    def base_of(self, group: Group) -> Group:
        """The base that the runs of `group` have measured."""
        return self._bases[id(group.runs[0])]

    @cached_property
    def _bases(self) -> dict[int, Group]:
        return {id(run): base for base in self.bases for run in base.runs}

    @property
    def columns(self) -> tuple[Group, ...]:
        """The columns of the tables: bases, then groups."""
        return *self.bases, *self.groups

    @property
    def defenses(self) -> list[str]:
        """In the order of the groups: `none` first."""
        return list(dict.fromkeys(group.defense for group in self.groups))

    def floor(self, group: Group) -> Estimate | None:
        """Behavior loss that fine-tuning without a defense reaches under the settings of `group`, nats/token."""
        same = [g for g in self.groups if g.defense == "none" and g.without_vector == group.without_vector]
        return same[0].estimate("behavior_loss") if same else None


def compare(runs: Iterable[RecordedRun]) -> Comparison:
    """Group the completed runs; failed ones are left out."""
    done = [run for run in runs if run.completed]
    settings = {id(run): _settings(run) for run in done}
    _tell_files_apart(done, settings)
    _tell_vectors_apart(done, settings)
    keys = _telling_keys(done, settings)
    names = {key: key.rsplit(".", 1)[-1] for key in keys}
    short = {key: name if list(names.values()).count(name) == 1 else key for key, name in names.items()}

    parts: dict[tuple[str, ...], list[RecordedRun]] = {}
    for run in done:
        parts.setdefault((run.defense, *(settings[id(run)].get(key, "") for key in keys)), []).append(run)
    order = sorted(parts, key=lambda part: (part[0] != "none", part[0], *map(sortable, part[1:])))
    groups = []
    for part in order:
        settings_shown = [f"{short[key]}={plain(value)}" for key, value in zip(keys, part[1:], strict=True) if value]
        label, of = " · ".join([part[0], *settings_shown]), parts[part]
        groups.append(Group(label, tuple(of), values=part[1:], settings=settings[id(of[0])]))

    return Comparison(tuple(_bases(groups, keys, short)), tuple(groups), keys)


def _bases(groups: Sequence[Group], keys: Sequence[str], short: Mapping[str, str]) -> list[Group]:
    """One base for each behavior and model, and for each value of the settings that make its values others."""
    scopes = list(dict.fromkeys(group.scope for group in groups))
    varying = [i for i in range(2) if len({scope[i] for scope in scopes}) > 1]
    bases = []
    for scope in scopes:
        some = [group for group in groups if group.scope == scope]
        telling = _telling_apart(some, len(keys))
        for values, of in _by_values(some, telling).items():
            names = [f"{_FIELDS[i]}={scope[i]}" for i in varying]
            names += [f"{short[keys[i]]}={plain(value)}" for i, value in zip(telling, values, strict=True) if value]
            bases.append(Group(" · ".join(["base", *names]), tuple(run for group in of for run in group.runs), "base"))
    return bases


def _telling_apart(groups: Sequence[Group], num_keys: int) -> tuple[int, ...]:
    """The fewest of the keys by whose values all runs of a seed have measured the same base; () where no keys do.

    A judge or a stream of data may be such a key, a defense is none: it does not change the base.
    """
    differ = [i for i in range(num_keys) if len({group.values[i] for group in groups}) > 1]
    tried = (some for size in range(min(len(differ), 3) + 1) for some in combinations(differ, size))
    return next((some for some in tried if all(map(_agree, _by_values(groups, some).values()))), ())


def _by_values(groups: Sequence[Group], keys: Sequence[int]) -> dict[tuple[str, ...], list[Group]]:
    parts: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        parts.setdefault(tuple(group.values[i] for i in keys), []).append(group)
    return parts


def _agree(groups: Sequence[Group]) -> bool:
    """Whether no two runs of one seed have measured other values of the same metric on the base."""
    seen: dict[tuple[int | None, str], float] = {}
    measured = [(run.seed, *one) for group in groups for run in group.runs for one in run.record.metrics.items()]
    return all(
        isclose(seen.setdefault((seed, name), found.value), found.value, rel_tol=SAME, abs_tol=SAME)
        for seed, name, found in measured
        if name.startswith("base/") and isfinite(found.value)
    )


def _telling_keys(runs: Sequence[RecordedRun], settings: Mapping[int, Mapping[str, str]]) -> tuple[str, ...]:
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
def _ignored(name: str, before: str) -> bool:
    if name == "stages" and before:  # of a callback
        return False
    return _IGNORED.fullmatch(name.lower()) is not None


def _settings(run: RecordedRun) -> dict[str, str]:
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
            elif _is_file(key) and isinstance(value, str):
                flat[key] = json.dumps(value)
            elif key == "seed" or key in _CACHES or (not before and name in NOT_IN_KEY) or _ignored(name, before):
                continue  # another seed (model.align.seed) makes another configuration
            elif isinstance(value, Mapping) and value:
                walk(value, f"{key}.")
            elif key not in flat:
                flat[key] = _encode(value)

    walk(run.record.config, "")
    return flat


def _is_file(key: str) -> bool:
    first, last = key.partition(".")[0], key.rpartition(".")[2]
    return first in _WITH_FILES and (last in OF_ROWS or _PATH.fullmatch(last) is not None) and key != "vector.path"


def _tell_files_apart(runs: Sequence[RecordedRun], settings: Mapping[int, dict[str, str]]) -> None:
    """Names files in `settings` by the end of their paths: by as much as tells those apart that hold something else.

    The same file may lie elsewhere: what the records know of its content is then the same.
    """
    for key in {key for of_run in settings.values() for key in of_run if _is_file(key)}:
        rows: dict[str, set[str]] = {}  # of each path, the digests of the runs
        for run in runs:
            if isinstance(path := json.loads(settings[id(run)].get(key, "null")), str):
                rows.setdefault(path, set()).add(_content(run, key, path))
        first: dict[str, str] = {}  # of each path, one that holds the same
        for path, found in rows.items():
            others = [other for other in first.values() if Path(other).name == Path(path).name]
            first[path] = next((other for other in others if rows[other] & found), path)
        names = {path: _end_of(same, set(first.values())) for path, same in first.items()}
        for of_run in settings.values():
            if (path := json.loads(of_run.get(key, "null"))) in names:
                of_run[key] = json.dumps(names[path])


def _content(run: RecordedRun, key: str, path: str) -> str:
    """What the record knows of the content of the file of a setting; of others than data and models their path."""
    kind = key.partition(".")[0]
    if kind == "model":
        return run.record.base.fingerprint if run.record.base else path
    return path if kind in ("judge", "answer_judge", "defense") else _encode(run.record.data.sha256)


def _end_of(path: str, paths: Set[str]) -> str:
    """The last parts of `path`, as many as no other of `paths` ends with."""
    parts = Path(path).parts
    ends = (parts[-length:] for length in range(1, len(parts)))
    alone = (end for end in ends if sum(Path(other).parts[-len(end) :] == end for other in paths) == 1)
    return "/".join(next(alone, ())) or path


def _tell_vectors_apart(runs: Sequence[RecordedRun], settings: Mapping[int, dict[str, str]]) -> None:
    """Names vectors by their whole paths where runs of one seed and the same settings took over different ones."""
    taken: dict[Any, dict[int, set[str | None]]] = {}  # by all settings and by seed, the paths
    whole = {id(run): (run.record.config.get("vector") or {}).get("path") for run in runs}
    place = {id(run): (run.defense, frozenset(settings[id(run)].items())) for run in runs}
    for run in runs:
        taken.setdefault(place[id(run)], {}).setdefault(run.seed, set()).add(whole[id(run)])
    for run in runs:
        if "vector.path" in settings[id(run)] and any(len(of) > 1 for of in taken[place[id(run)]].values()):
            settings[id(run)]["vector.path"] = json.dumps(whole[id(run)])


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
