"""Search with Optuna: the space, the bounds, failed trials, and that the same search repeats itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from secvec.errors import ConfigError
from secvec.metrics import Measurement
from secvec.multirun.search import Search
from secvec.runs.record import Record
from secvec.settings.messages import checked
from secvec.settings.multirun import SearchSettings

SPACE = {
    "optimizer.lr": {"low": 1e-4, "high": 1e-1, "log": True},
    "epochs": {"low": 1, "high": 9},
    "tune": ["full", "lora"],
}
BOUNDS = {"after/task_accuracy": {"min": 0.8}}


def settings(**changed: Any) -> SearchSettings:
    values = yaml.safe_load((ROOT / "conf" / "hydra" / "sweeper" / "search.yaml").read_text())
    values.pop("_target_")
    return checked(SearchSettings, values | {"space": SPACE, **changed}, "hydra.sweeper")


def record(params: dict[str, Any], seed: int = 0) -> Record:
    """A run in which more of everything teaches more of the behavior, and too high a rate costs the task."""
    rate = params["optimizer.lr"]
    if rate > 0.08:
        return Record(run="diverged", status="failed", error="the loss is nan")
    behavior = rate * params["epochs"] * (1.0 if params["tune"] == "full" else 0.5) + seed
    values = {"after/behavior_rate": behavior, "after/task_accuracy": 1 - 10 * rate}
    metrics = {name: Measurement(value) for name, value in values.items()}
    return Record(run=f"run-{seed}", status="completed", defense="none", seed=seed, metrics=metrics)


def run(search: Search, outcome: Callable[[dict[str, Any]], Record] = record) -> Search:
    while batch := search.ask():
        for trial in batch:
            search.tell(trial, [outcome(trial.params)])
    return search


def test_the_same_search_asks_for_the_same_trials_and_another_seed_for_others() -> None:
    first, second, other = (run(Search(settings(bounds=BOUNDS, seed=seed))) for seed in (0, 0, 1))
    assert first.trials == second.trials and len(first.trials) == 20
    assert [t.params for t in first.trials] != [t.params for t in other.trials]


def test_what_is_told_changes_what_is_asked_after_the_start() -> None:
    def opposite(params: dict[str, Any]) -> Record:
        told = record(params)
        told.metrics = {name: Measurement(-metric.value) for name, metric in told.metrics.items()}
        return told

    first, other = run(Search(settings())), run(Search(settings()), opposite)
    n = settings().n_startup_trials
    assert [t.params for t in first.trials[:n]] == [t.params for t in other.trials[:n]]
    assert [t.params for t in first.trials[n:]] != [t.params for t in other.trials[n:]]


def test_values_are_of_the_space() -> None:
    trials = run(Search(settings(n_trials=30))).trials
    assert {type(t.params["epochs"]) for t in trials} == {int} and {t.params["tune"] for t in trials} == {
        "full",
        "lora",
    }
    assert all(1e-4 <= t.params["optimizer.lr"] <= 1e-1 and 1 <= t.params["epochs"] <= 9 for t in trials)


def test_the_best_keeps_the_bounds_and_the_search_learns_them() -> None:
    search = run(Search(settings(bounds=BOUNDS, n_trials=60)))
    best, free = search.best(), search.best(within_bounds=False)
    assert best is not None and free is not None and best.value is not None and free.value is not None
    assert best.params["optimizer.lr"] <= 0.02 < free.params["optimizer.lr"] and best.value < free.value
    inside = [t for t in search.trials if t.feasible]
    assert best.value == max(t.value or 0 for t in inside)
    assert all(t.bounded["after/task_accuracy"] >= 0.8 for t in inside)
    # 0.02 parts the logarithm of the space at three quarters; unbounded, the search stays above it
    unbounded = run(Search(settings(n_trials=60)))
    low = [sum(t.params["optimizer.lr"] <= 0.02 for t in s.trials[20:]) for s in (search, unbounded)]
    assert low[0] > low[1]


def test_minimizing_finds_the_other_end() -> None:
    low, high = run(Search(settings(direction="minimize"))).best(), run(Search(settings())).best()
    assert low is not None and high is not None and low.value is not None and low.value < (high.value or 0.0)


def test_a_trial_counts_by_the_mean_over_its_seeds_and_fails_with_any_of_them() -> None:
    search = Search(settings(batch=3, bounds=BOUNDS))
    whole, broken, nan = search.ask()
    params = {"optimizer.lr": 0.01, "epochs": 1, "tune": "full"}
    search.tell(whole, [record(params, seed) for seed in (0, 1)])
    assert whole.value == pytest.approx(0.51) and whole.feasible and whole.runs == ["run-0", "run-1"]
    search.tell(broken, [record(params), Record(run="x", status="failed", error="killed by signal 9")])
    assert (broken.value, broken.feasible, broken.error) == (None, False, "killed by signal 9")
    search.tell(nan, [record({**params, "optimizer.lr": float("nan")})])
    assert nan.value is None and "not finite: after/behavior_rate" in str(nan.error)
    assert search.best() is whole


def test_without_a_trial_within_the_bounds_there_is_no_best(tmp_path: Path) -> None:
    search = run(Search(settings(bounds={"after/task_accuracy": {"min": 2}}, n_trials=3)))
    assert search.best() is None and search.best(within_bounds=False) is not None
    search.save(tmp_path / "search.json")
    found = json.loads((tmp_path / "search.json").read_text())
    assert found["best"] is None and found["best_without_bounds"]["value"] > 0 and len(found["trials"]) == 3
    assert found["search"]["bounds"] == {"after/task_accuracy": {"min": 2.0, "max": None}}
    assert search.table().count("out of bounds") + search.table().count("failed") == 3


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.space is empty"):
        Search(settings(space={}))
    with pytest.raises(ConfigError, match=r"low=3.* must be below high=1"):
        settings(space={"finetune.epochs": {"low": 3, "high": 1}})
    search = Search(settings(metric="after/behaviour_rate"))
    trial = search.ask()[0]
    with pytest.raises(ConfigError, match=r"no metric 'after/behaviour_rate'.*mean 'after/behavior_rate'"):
        search.tell(trial, [record({"optimizer.lr": 0.01, "epochs": 1, "tune": "full"})])
