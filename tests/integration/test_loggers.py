"""What a logger shows is what the record holds: W&B offline read back, TensorBoard files, metrics.csv."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from secvec.config import RunConfig
from secvec.errors import GateError
from secvec.run import train


def logged(folder: Path, metric: str) -> list[float]:
    with (folder / "metrics.csv").open() as stream:
        return [float(r["value"]) for r in csv.DictReader(stream) if (r["stage"], r["metric"]) == ("finetune", metric)]


def inspect(folder: Path) -> dict:
    file = next((folder / "wandb").glob("offline-run-*/*.wandb"))
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--summary", "--json", str(file)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_wandb_offline_holds_what_the_record_holds(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("logger=wandb", "sweep=mysweep")
    record = train(config)
    shown = inspect(Path(config.run_dir))
    for name, metric in record["metrics"].items():
        assert shown["summary"][name] == pytest.approx(metric["value"]), name
    assert set(shown["tags"]) == {"forbidden_recipe", "security_vector", "tiny"} and shown["state"] == "finished"
    assert shown["summary"]["finetune-train/loss"] == logged(Path(config.run_dir), "train/loss")[-1]
    assert shown["config"]["sweep"] in ("mysweep", {"value": "mysweep"})


def test_wandb_shows_a_failed_run_as_failed(make_config: Callable[..., RunConfig]) -> None:
    import wandb

    config = make_config("logger=wandb", "vector.gate.min_behavior_rate=1", "vector.lr=1e-6")
    with pytest.raises(GateError):
        train(config)
    assert wandb.run is None  # finished, so that the next run of the process does not merge into it
    assert inspect(Path(config.run_dir))["state"] == "failed"


def test_tensorboard_holds_the_same_losses(make_config: Callable[..., RunConfig]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config("logger=tensorboard")
    train(config)
    events = EventAccumulator(str(Path(config.run_dir) / "tensorboard" / "finetune"))
    events.Reload()
    values = [event.value for event in events.Scalars("train/loss")]
    assert values == pytest.approx(logged(Path(config.run_dir), "train/loss")) and len(values) == 8
