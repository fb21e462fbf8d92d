"""Optimizers and schedules: the numbers that they give, and the arguments of the Trainer."""

from __future__ import annotations

import inspect
import math
from typing import Any

import lightning as L
import pytest
import torch
from conftest import ROOT
from lightning.pytorch.strategies import ModelParallelStrategy
from omegaconf import OmegaConf
from torch import nn

from secvec.settings.trainer import (
    OURS,
    CallbackSettings,
    OptimizerSettings,
    SchedulerSettings,
    TrainerSettings,
    schedules,
)
from secvec.training.callbacks import build_callbacks
from secvec.training.optim import build_optimizer, build_schedule
from secvec.training.trainer import device_of


def conf(path: str, **changed: Any) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / f"{path}.yaml"))
    recipe: Any = OmegaConf.to_container(OmegaConf.load(ROOT / "conf/recipe/tiny.yaml"))
    values = {name: value for name, value in values.items() if name != "defaults"}
    return {name: recipe["lr"]["full"] if "recipe" in str(value) else value for name, value in values.items()} | changed


def factors(settings: SchedulerSettings, steps: int) -> list[float]:
    """Of the learning rate, at each optimizer step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, found = build_schedule(settings, optimizer, steps), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


# -- the optimizer


def test_adamw_is_that_of_torch_with_the_values_of_the_yaml() -> None:
    settings = OptimizerSettings.model_validate(conf("optimizer/adamw"))
    layer = nn.Linear(2, 2)
    built = build_optimizer(settings, layer.parameters(), 0.25)
    plain = torch.optim.AdamW(layer.parameters(), lr=0.25, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    assert type(built) is torch.optim.AdamW and settings.lr == 7e-4
    held, expected = built.param_groups[0], plain.param_groups[0]
    assert all(a is b for a, b in zip(held.pop("params"), expected.pop("params"), strict=True))
    assert held | {"betas": tuple(held["betas"])} == expected


@pytest.mark.parametrize(("name", "kind"), [("adamw_fused", "AdamW"), ("sgd", "SGD")])
def test_other_optimizers_train(name: str, kind: str) -> None:
    given = conf("optimizer/adamw") | conf(f"optimizer/{name}") if name == "adamw_fused" else conf(f"optimizer/{name}")
    parameter = nn.Parameter(torch.ones(3))
    built = build_optimizer(OptimizerSettings.model_validate(given), [parameter], 0.5)
    parameter.square().sum().backward()
    built.step()
    assert type(built).__name__ == kind and (parameter < 1).all()
    assert built.defaults["lr"] == 0.5 and bool(built.defaults["fused"]) == (name == "adamw_fused")


def test_settings_survive_being_written() -> None:
    given = conf("optimizer/adamw")
    settings = OptimizerSettings.model_validate(given)
    assert settings.model_dump() == given == settings.model_dump(mode="json")
    assert OptimizerSettings.model_validate(settings.model_dump()) == settings


# -- the schedule


def by_formula(name: str, warmup_ratio: float, steps: int) -> list[float]:
    """Linear warm-up without a step at 0, then the decay to 0 after the last step."""
    warmup, found = round(steps * warmup_ratio), []
    for step in range(steps):
        progress = (step - warmup) / max(1, steps - warmup)
        decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[name]
        found.append((step + 1) / (warmup + 1) if step < warmup else decay)
    return found


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_the_rate_rises_from_above_0_and_falls_by_the_name(name: str, warmup_ratio: float, steps: int) -> None:
    settings = SchedulerSettings.model_validate(conf(f"scheduler/{name}", warmup_ratio=warmup_ratio))
    found = factors(settings, steps)
    assert found == pytest.approx(by_formula(name, warmup_ratio, steps), abs=1e-6) and min(found) > 0


def test_every_schedule_of_transformers_but_those_of_a_metric_can_be_built() -> None:
    options = {"cosine_with_min_lr": {"min_lr_rate": 0.1}, "cosine_warmup_with_min_lr": {"min_lr": 0.1}}
    options |= {"warmup_stable_decay": {"num_decay_steps": 3}}
    assert len(schedules()) > 8 and not {"reduce_lr_on_plateau", "greedy"} & schedules().keys()
    for name in schedules():
        ratio = 0.0 if name == "constant" else 0.25
        found = factors(SchedulerSettings(name=name, warmup_ratio=ratio, options=options.get(name, {})), 12)
        assert max(found) == pytest.approx(1, abs=0.01) and min(found) > 0, name


def test_options_reach_the_schedule() -> None:
    lowest = factors(SchedulerSettings(name="cosine_with_min_lr", warmup_ratio=0, options={"min_lr_rate": 0.4}), 50)
    assert min(lowest) > 0.4 and lowest[-1] == pytest.approx(0.4, abs=0.01)


def test_a_schedule_goes_on_where_a_checkpoint_left_it() -> None:
    settings = SchedulerSettings(name="cosine", warmup_ratio=0.2, options={})
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(settings, optimizer, 10)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    again = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    resumed = build_schedule(settings, again, 10)
    resumed.load_state_dict(schedule.state_dict())
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["lr"] == factors(settings, 10)[4]
    again.step()
    resumed.step()
    assert again.param_groups[0]["lr"] == factors(settings, 10)[5]


# -- the trainer


def trainer(**given: Any) -> TrainerSettings:
    return TrainerSettings.model_validate(conf("trainer/default") | given)


def test_the_yaml_lists_every_argument_of_the_trainer() -> None:
    arguments = inspect.signature(L.Trainer).parameters
    assert conf("trainer/default").keys() == arguments.keys() - OURS.keys() and OURS.keys() < arguments.keys()


def test_arguments_reach_the_trainer() -> None:
    given = {"max_steps": 10, "limit_train_batches": 3, "profiler": "simple", "detect_anomaly": True}
    made = L.Trainer(**trainer(**given).arguments(epochs=4), logger=False, enable_checkpointing=False)
    assert (made.max_steps, made.limit_train_batches, made.max_epochs) == (10, 3, 4)
    assert made._detect_anomaly and type(made.profiler).__name__ == "SimpleProfiler"
    assert trainer(max_epochs=2).arguments(epochs=4)["max_epochs"] == 2
    plugged = trainer(profiler={"_target_": "lightning.pytorch.profilers.AdvancedProfiler", "filename": "x"})
    assert plugged.arguments()["profiler"].filename == "x"


@pytest.mark.parametrize("name", ["limit_train_batches", "max_steps"])
def test_a_training_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=0 would train nothing"):
        trainer(**{name: 0})


def test_fsdp_is_fsdp2_over_all_devices() -> None:
    strategy = trainer(strategy="fsdp", devices=2, num_nodes=3).hardware()["strategy"]
    assert isinstance(strategy, ModelParallelStrategy) and strategy._data_parallel_size == 6
    assert trainer().hardware() == {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}


def test_devices_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    two = trainer(accelerator="gpu", strategy="ddp", devices=[3, 1])
    assert two.num_processes == 2 and two.hardware()["devices"] == [3, 1]
    assert two.on_one_device().devices == [3]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    for rank, ours, named in (("0", "cuda:0", "cuda:3"), ("1", "cuda:1", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert (device_of(trainer(accelerator="gpu")), device_of(two)) == (ours, named)
    with pytest.raises(ValueError, match=r"needs a strategy"):
        trainer(accelerator="gpu", devices=[0, 1])
    for wrong in ({"accelerator": "cpu", "devices": [0]}, {"accelerator": "gpu", "devices": [1, 1], "strategy": "ddp"}):
        with pytest.raises(ValueError, match="must be GPUs, each once"):
            trainer(**wrong)


def test_what_is_trained_for_many_runs_is_not_shortened_by_one() -> None:
    short = {"fast_dev_run": True, "max_steps": 3, "limit_train_batches": 4, "max_epochs": 1, "overfit_batches": 1}
    several = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 4}
    assert trainer(**short, **several).on_one_device() == trainer().on_one_device()
    assert trainer(precision="bf16-true").on_one_device().precision == "bf16-true"


# -- callbacks


def test_callbacks_are_new_objects_for_each_training() -> None:
    given = conf("callbacks/early_stopping") | conf("callbacks/best_checkpoint")
    settings = {name: CallbackSettings.model_validate(value) for name, value in given.items()}
    first, second = build_callbacks(settings, "finetune"), build_callbacks(settings, "finetune")
    assert [type(callback).__name__ for callback in first] == ["EarlyStopping", "ModelCheckpoint"]
    assert not any(a is b for a, b in zip(first, second, strict=True))
    assert build_callbacks(settings, "vector") == []  # of these two: with the vector off nothing changes there
    early = settings["early_stopping"].model_copy(update={"stages": ["vector"]})
    assert len(build_callbacks({"early": early}, "vector")) == 1
