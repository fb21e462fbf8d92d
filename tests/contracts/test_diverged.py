"""A training whose loss or weights are no numbers stops as a failure: nothing is saved, and the record says where."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import run_of

from secvec import run
from secvec.config.schema import RunConfig
from secvec.errors import DivergedError
from secvec.run import train
from secvec.stages import STAGES
from secvec.training.trainer import StopWhenDiverged, Training

STOP = StopWhenDiverged(Training(Path("run"), "vector", "vector.lr", 0, 1, None))  # type: ignore[arg-type]


def trainer(**strategy: Any) -> Any:
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}])
    rest = {"global_step": 3, "estimated_stepping_batches": 9, "optimizers": [optimizer]}
    return SimpleNamespace(strategy=SimpleNamespace(**strategy), **rest)


def test_a_run_that_diverges_has_failed(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("defense=none", "telemetry.every_n_steps=0", "optimizer.lr=1e30")
    with pytest.raises(DivergedError, match=r"stage finetune diverged: after \d of 8 steps the loss is ") as caught:
        train(config)
    assert caught.value.exit_code == 1 and "Lower optimizer.lr" in str(caught.value)
    folder = Path(config.run_dir)
    record = json.loads((folder / "record.json").read_text())
    assert record["status"] == "failed" and "diverged: after" in record["error"] and record["stages"] == []
    assert not (folder / "backbone").exists()


@pytest.mark.parametrize(("elsewhere", "stops"), [(float("nan"), True), (1.0, False)])
def test_all_processes_stop_when_one_has_diverged(elsewhere: float, stops: bool) -> None:
    """The others would wait for its gradients."""
    with pytest.raises(DivergedError, match="loss is nan") if stops else nullcontext():
        STOP.on_before_backward(
            trainer(reduce=lambda loss, reduce_op: (loss + elsewhere) / 2),
            Any,
            torch.tensor(1.0),  # type: ignore[arg-type]
        )


@pytest.mark.parametrize(("weight", "stops"), [(float("inf"), True), (1.0, False)])
def test_weights_after_the_last_step_are_looked_at_too(weight: float, stops: bool) -> None:
    """No loss comes after it."""
    module = SimpleNamespace(device="cpu", trained=lambda: [("w", torch.nn.Parameter(torch.tensor([0.0, weight])))])
    with pytest.raises(DivergedError, match=r"no finite numbers .*vector\.lr") if stops else nullcontext():
        STOP.on_train_epoch_end(trainer(reduce=lambda count, reduce_op: count), module)


@pytest.mark.parametrize(
    ("stage", "label", "rate"),
    [
        ("vector", "vector-2", "vector.lr"),
        ("finetune", "finetune", "optimizer.lr"),
        ("finetune", "finetune-1", "optimizer.lr"),
    ],
)
def test_every_stage_and_cycle_names_its_rate(
    make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, stage: str, label: str, rate: str
) -> None:
    found: list[Training] = []
    monkeypatch.setattr(run, "fit", lambda module, data, training, *rest: found.append(training))
    run_of(make_config()).fit(SimpleNamespace(stage=STAGES[stage]), label, 1, Path())  # type: ignore[arg-type]
    with pytest.raises(DivergedError, match=f"stage {label} diverged.*Lower {rate}"):
        StopWhenDiverged(found[0]).on_before_backward(
            trainer(reduce=lambda loss, reduce_op: loss),
            Any,
            torch.tensor(torch.inf),  # type: ignore[arg-type]
        )


def test_so_does_the_alignment(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config("model.align.lr=1e30", f"paths.cache={tmp_path / 'own'}")
    with pytest.raises(DivergedError, match=r"stage align diverged.*Lower model\.align\.lr"):
        run_of(config).backbone  # noqa: B018
    assert not list((tmp_path / "own" / "models").glob("*/config.json"))
