"""A training whose loss or weights are no numbers stops as a failure: nothing is saved, and the record says where."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
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


def stop() -> StopWhenDiverged:
    return StopWhenDiverged(Training(Path("run"), "vector", "vector.lr", 0, 1, None))  # type: ignore[arg-type]


def trainer(every: int = 1, **strategy: Any) -> Any:
    optimizer = SimpleNamespace(param_groups=[{"lr": 1.0}])
    rest = {"global_step": 3, "estimated_stepping_batches": 9, "optimizers": [optimizer], "log_every_n_steps": every}
    strategy = {"reduce": lambda values, reduce_op: values} | strategy
    return SimpleNamespace(strategy=SimpleNamespace(**strategy), accumulate_grad_batches=1, **rest)


def steps(callback: StopWhenDiverged, runner: Any, losses: list[float]) -> None:
    """A training of these losses."""
    for loss in losses:
        callback.on_before_backward(runner, Any, torch.tensor(loss))  # type: ignore[arg-type]
        runner.global_step += 1
        callback.on_train_batch_end(runner, Any, Any, Any, runner.global_step - 1)


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
    with pytest.raises(DivergedError, match="after 3 of 9 steps the loss is nan") if stops else nullcontext():
        steps(stop(), trainer(reduce=lambda loss, reduce_op: (loss + elsewhere) / 2), [1.0])


def test_the_loss_is_looked_at_when_a_step_is_logged_and_the_message_names_its_own_step() -> None:
    callback, runner = stop(), trainer(every=4)
    steps(callback, runner, [1.0, 2.0])  # steps 4 and 5: logged and looked at after step 4
    assert [step for step, *_ in callback.losses] == [4]
    runner.optimizers[0].param_groups[0]["lr"] = 0.5
    steps(callback, runner, [float("inf")])
    runner.optimizers[0].param_groups[0]["lr"] = 0.25
    with pytest.raises(DivergedError, match=r"after 5 of 9 steps the loss is inf \(learning rate 0\.5\)"):
        steps(callback, runner, [float("nan"), 1.0])
    assert runner.global_step == 8


BAD = [(1.0, torch.inf, True), (torch.nan, 1.0, True), (1.0, 1.0, False)]


@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_end", "checkpoint"])
@pytest.mark.parametrize(("loss", "weight", "stops"), BAD)
def test_both_are_looked_at_before_anything_is_saved(hook: str, loss: float, weight: float, stops: bool) -> None:
    """No loss comes after the last step, and a step that is not logged is not looked at."""
    callback, runner = stop(), trainer(every=100)
    weights = torch.nn.Parameter(torch.tensor([0.0, weight]))
    module = SimpleNamespace(trained=lambda: [("v", torch.nn.Parameter(torch.zeros(2))), ("w", weights)])
    callback.on_fit_start(runner, module)
    steps(callback, runner, [loss])
    end = module.before_checkpoint if hook == "checkpoint" else partial(getattr(callback, hook), runner, module)
    what = r"(NaN or infinite|loss is nan) .*vector\.lr"
    with pytest.raises(DivergedError, match=what) if stops else nullcontext():
        end()


@pytest.mark.parametrize("weights_only", [True, False])
def test_no_callback_of_lightning_saves_bad_weights(make_config: Callable[..., RunConfig], weights_only: bool) -> None:
    """Here after each step, when no loss was looked at."""
    config = make_config(
        "defense=none", "stage=finetune", "telemetry.every_n_steps=0", "optimizer.lr=1e30",
        "trainer.log_every_n_steps=100", "evaluation.validation.num_samples=0",
        "+callbacks.each._target_=lightning.pytorch.callbacks.ModelCheckpoint", "+callbacks.each.every_n_train_steps=1",
        f"+callbacks.each.save_weights_only={weights_only}", "+callbacks.each.save_top_k=-1",
    )  # fmt: skip
    with pytest.raises(DivergedError, match=r"diverged: after \d of 8 steps"):
        train(config)
    for file in Path(config.run_dir).rglob("*.ckpt"):
        assert all(w.isfinite().all() for w in torch.load(file, weights_only=True)["state_dict"].values())


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
    module = SimpleNamespace(stage=STAGES[stage], ledger=list, release=bool)
    run_of(make_config()).fit(module, label, 1, Path())  # type: ignore[arg-type]
    with pytest.raises(DivergedError, match=f"stage {label} diverged.*Lower {rate}"):
        steps(StopWhenDiverged(found[0]), trainer(), [torch.inf])


def test_so_does_the_alignment(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config("model.align.lr=1e30", f"paths.cache={tmp_path / 'own'}")
    with pytest.raises(DivergedError, match=r"stage align diverged.*Lower model\.align\.lr"):
        run_of(config).backbone  # noqa: B018
    assert not list((tmp_path / "own" / "models").glob("*/config.json"))
