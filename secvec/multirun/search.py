"""Search over settings by Optuna: its trials, the bounds on other metrics, the best trial. The same search repeats."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from secvec.errors import ConfigError, nearest
from secvec.runs.console import table
from secvec.runs.files import write_atomic
from secvec.runs.record import Record
from secvec.settings.multirun import Bound, Range, SearchSettings

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial as OptunaTrial


@dataclass
class Trial:
    """One point of the space, and its result."""

    number: int
    params: dict[str, Any]
    """Setting or group -> its value."""
    runs: list[str] = field(default_factory=list)
    """Names of its run folders, one for each seed."""
    value: float | None = None
    """Mean of the metric over its runs; None: failed."""
    bounded: dict[str, float] = field(default_factory=dict)
    """Means of the metrics that have bounds."""
    feasible: bool = False
    """Whether the metrics keep their bounds."""
    error: str | None = None


class Search:
    """Chooses trials and learns from their records, in batches.

    The sampler is seeded and learns from the records alone. The same search therefore chooses the same trials again,
    and goes on after an interruption without a database.
    """

    def __init__(self, settings: SearchSettings):
        try:
            import optuna
        except ImportError:
            raise ConfigError("hydra/sweeper=search needs Optuna: pip install 'secvec[search]'") from None
        if not settings.space:
            raise ConfigError("hydra.sweeper.space is empty: name the settings to search, each with choices or a range")
        self.settings, self.trials = settings, list[Trial]()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=settings.seed, n_startup_trials=settings.n_startup_trials, constant_liar=settings.batch > 1
        )
        self.asked: dict[int, OptunaTrial] = {}
        self.study = optuna.create_study(direction=settings.direction, sampler=sampler)
        self.space = {name: _distribution(allowed) for name, allowed in settings.space.items()}

    def ask(self) -> list[Trial]:
        """The next batch of trials; empty after the last."""
        n = min(self.settings.batch, self.settings.n_trials - len(self.trials))
        asked = [self.study.ask(self.space) for _ in range(n)]
        self.asked |= {trial.number: trial for trial in asked}
        batch = [Trial(trial.number, {name: trial.params[name] for name in self.space}) for trial in asked]
        self.trials += batch
        return batch

    def tell(self, trial: Trial, records: Sequence[Record]) -> None:
        """Takes the records of the runs of `trial`. Raises ConfigError for a metric that finished runs do not have."""
        from optuna.trial import TrialState

        settings = self.settings
        trial.runs = [record.run for record in records]
        names = [settings.metric, *settings.bounds]
        failed = [record for record in records if record.status != "completed"]
        means = {} if failed else {name: fmean(_value(record, name) for record in records) for name in names}
        not_finite = [name for name, mean in means.items() if not math.isfinite(mean)]
        if failed or not_finite:
            trial.error = failed[0].error if failed else f"not finite: {', '.join(not_finite)}"
            self.study.tell(trial.number, state=TrialState.FAIL)
            return
        trial.value, trial.bounded = means[settings.metric], {name: means[name] for name in settings.bounds}
        outside = {name: _outside(bound, means[name]) for name, bound in settings.bounds.items()}
        trial.feasible = all(distance <= 0 for distance in outside.values())
        for name, distance in outside.items():
            self.asked[trial.number].set_constraint(name, distance)
        self.study.tell(trial.number, trial.value)

    def best(self, within_bounds: bool = True) -> Trial | None:
        """The trial with the highest (lowest) metric, the earliest of equals; None where every trial failed."""
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
        rows = []
        for trial in order:
            values = [*trial.params.values(), trial.value, *(trial.bounded.get(name) for name in settings.bounds)]
            rows.append([str(trial.number), *map(_short, values), _state(trial)])
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


def _value(record: Record, name: str) -> float:
    if name not in record.metrics:
        raise ConfigError(
            f"hydra.sweeper: {record.run} has no metric {name!r}{nearest(name, record.metrics)}; it has: "
            + ", ".join(sorted(record.metrics))
        )
    return record.metrics[name].value


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
