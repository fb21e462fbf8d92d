"""Search over settings with Optuna: trials, the bounds they keep, and the best one. Repeated, it repeats itself."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from secvec.errors import ConfigError, nearest
from secvec.runs.console import table
from secvec.runs.files import write_atomic
from secvec.settings.schema import Bound, Range, SearchSettings

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial as OptunaTrial


@dataclass
class Trial:
    """One point of the space and what came of it."""

    number: int
    params: dict[str, Any]
    """Setting or group -> its value."""
    runs: list[str] = field(default_factory=list)
    """Names of its run folders, one per seed."""
    value: float | None = None
    """Mean of the metric over its runs; None: failed."""
    bounded: dict[str, float] = field(default_factory=dict)
    """Means of the metrics that have bounds."""
    feasible: bool = False
    """Whether it keeps the bounds."""
    error: str | None = None


class Search:
    """Asks for trials and is told what came of them.

    The sampler is seeded and everything it learns from is in the records, so that the same search asks for the same
    trials again: it needs no database to go on after it was cut off.
    """

    def __init__(self, settings: SearchSettings):
        try:
            import optuna
        except ImportError:
            raise ConfigError("hydra/sweeper=optuna needs Optuna: pip install 'secvec[search]'") from None
        if not settings.space:
            raise ConfigError("hydra.sweeper.space is empty: name the settings to search, each with choices or a range")
        self.settings, self.trials = settings, list[Trial]()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            sampler = optuna.samplers.TPESampler(
                seed=settings.seed, n_startup_trials=settings.n_startup_trials, constant_liar=settings.batch > 1,
            )  # fmt: skip
        self.asked: dict[int, OptunaTrial] = {}
        self.study = optuna.create_study(direction=settings.direction, sampler=sampler)
        self.space = {name: _distribution(allowed) for name, allowed in settings.space.items()}

    def ask(self) -> list[Trial]:
        """The next batch; empty when all have been asked."""
        n = min(self.settings.batch, self.settings.n_trials - len(self.trials))
        asked = [self.study.ask(self.space) for _ in range(n)]
        self.asked |= {trial.number: trial for trial in asked}
        batch = [Trial(trial.number, {name: trial.params[name] for name in self.space}) for trial in asked]
        self.trials += batch
        return batch

    def tell(self, trial: Trial, records: Sequence[Mapping[str, Any]]) -> None:
        """What its runs recorded. Raises ConfigError for a metric that finished runs do not have."""
        from optuna.exceptions import ExperimentalWarning
        from optuna.trial import TrialState

        settings = self.settings
        trial.runs = [str(record.get("run")) for record in records]
        failed = [record for record in records if record.get("status") != "completed"]
        if failed:
            trial.error = str(failed[0].get("error") or "it left no record")
            self.study.tell(trial.number, state=TrialState.FAIL)
            return
        means = {
            name: fmean(_value(record, name) for record in records) for name in [settings.metric, *settings.bounds]
        }
        if not all(math.isfinite(mean) for mean in means.values()):
            trial.error = f"not finite: {', '.join(name for name, mean in means.items() if not math.isfinite(mean))}"
            self.study.tell(trial.number, state=TrialState.FAIL)
            return
        trial.value, trial.bounded = means[settings.metric], {name: means[name] for name in settings.bounds}
        outside = {name: _outside(bound, means[name]) for name, bound in settings.bounds.items()}
        trial.feasible = all(distance <= 0 for distance in outside.values())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            for name, distance in outside.items():
                self.asked[trial.number].set_constraint(name, distance)
        self.study.tell(trial.number, trial.value)

    def best(self, within_bounds: bool = True) -> Trial | None:
        """The trial whose metric is highest (lowest); the earliest of equals; None without any."""
        known = [t for t in self.trials if t.value is not None and (t.feasible or not within_bounds)]
        sign = 1 if self.settings.direction == "maximize" else -1
        return max(known, key=lambda trial: sign * (trial.value or 0.0), default=None)

    def save(self, path: Path) -> None:
        """Writes search.json: what was searched, every trial, the best one with and without the bounds."""
        best, free = self.best(), self.best(within_bounds=False)
        found = {
            "search": self.settings.model_dump(mode="json"),
            "best": None if best is None else vars(best),
            "best_without_bounds": None if free is None else vars(free),
            "trials": [vars(trial) for trial in self.trials],
        }
        write_atomic(path, json.dumps(found, indent=1) + "\n")

    def table(self) -> str:
        """All trials, the best one first."""
        settings = self.settings
        sign = -1 if settings.direction == "maximize" else 1
        order = sorted(self.trials, key=lambda t: (not t.feasible, t.value is None, sign * (t.value or 0.0)))
        rows = [
            [
                str(trial.number), *(_short(value) for value in trial.params.values()), _short(trial.value),
                *(_short(trial.bounded.get(name)) for name in settings.bounds), _state(trial),
            ]
            for trial in order
        ]  # fmt: skip
        bounds = ", ".join(_shown(name, bound) for name, bound in settings.bounds.items())
        title = f"{settings.direction} {settings.metric}{' with ' if bounds else ''}{bounds}"
        return table(title, ["trial", *self.space, settings.metric, *settings.bounds, ""], rows)


def _distribution(allowed: list[Any] | Range) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(allowed, Range):
        return CategoricalDistribution(allowed)
    if isinstance(allowed.low, int) and isinstance(allowed.high, int):
        return IntDistribution(allowed.low, allowed.high, log=allowed.log)
    return FloatDistribution(allowed.low, allowed.high, log=allowed.log)


def _value(record: Mapping[str, Any], name: str) -> float:
    metrics = record.get("metrics") or {}
    if name not in metrics:
        raise ConfigError(
            f"hydra.sweeper: {record.get('run')} has no metric {name!r}{nearest(name, metrics)}; it has: "
            + ", ".join(sorted(metrics))
        )
    return float(metrics[name]["value"])


def _outside(bound: Bound, value: float) -> float:
    """How far `value` is outside; 0 or less inside."""
    below = -math.inf if bound.min is None else bound.min - value
    above = -math.inf if bound.max is None else value - bound.max
    return max(below, above)


def _shown(name: str, bound: Bound) -> str:
    low = "" if bound.min is None else f"{bound.min:g} <= "
    return f"{low}{name}" + ("" if bound.max is None else f" <= {bound.max:g}")


def _short(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _state(trial: Trial) -> str:
    return "failed" if trial.value is None else "" if trial.feasible else "out of bounds"
