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

from secvec.config.load import RunConfig
from secvec.errors import DivergedError
from secvec.run import train
from secvec.training.trainer import _Finite


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
        _Finite("vector").on_before_backward(
            trainer(reduce=lambda loss, reduce_op: (loss + elsewhere) / 2),
            Any,
            torch.tensor(1.0),  # type: ignore[arg-type]
        )


@pytest.mark.parametrize(("weight", "stops"), [(float("inf"), True), (1.0, False)])
def test_weights_after_the_last_step_are_looked_at_too(weight: float, stops: bool) -> None:
    """No loss comes after it."""
    module = SimpleNamespace(device="cpu", trained=lambda: [("w", torch.nn.Parameter(torch.tensor([0.0, weight])))])
    with pytest.raises(DivergedError, match=r"no finite numbers .*vector\.lr") if stops else nullcontext():
        _Finite("vector").on_train_end(trainer(reduce=lambda count, reduce_op: count), module)


@pytest.mark.parametrize(
    ("stage", "rate"), [("align", "model.align.lr"), ("vector-2", "vector.lr"), ("finetune-1", "optimizer.lr")]
)
def test_every_stage_and_cycle_names_its_rate(stage: str, rate: str) -> None:
    with pytest.raises(DivergedError, match=f"stage {stage} diverged.*Lower {rate}"):
        _Finite(stage).on_before_backward(trainer(reduce=lambda loss, reduce_op: loss), Any, torch.tensor(torch.inf))  # type: ignore[arg-type]
