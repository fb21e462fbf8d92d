"""The optimizer and the learning-rate schedule of a training, from its settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from secvec.settings.trainer import OptimizerSettings, SchedulerSettings

if TYPE_CHECKING:
    from secvec.defenses.base import Defense


def build_optimizer(
    settings: OptimizerSettings, parameters: Iterable[nn.Parameter], lr: float
) -> torch.optim.Optimizer:
    """The optimizer of `parameters` at the learning rate `lr`."""
    optimizer: torch.optim.Optimizer = settings.build(list(parameters), lr=lr)
    return optimizer


def build_schedule(settings: SchedulerSettings, optimizer: torch.optim.Optimizer, steps: int) -> LambdaLR:
    """The schedule of `optimizer` over `steps` optimizer steps, to be stepped after each of them."""
    # transformers' schedules begin and end at a rate of 0. Ours has a step more at each end and is entered one step
    # further on: no optimizer step is wasted at a rate of 0
    schedule = get_scheduler(
        settings.name,
        optimizer,
        round(steps * settings.warmup_ratio) + 1,
        steps + 1,
        scheduler_specific_kwargs=settings.options,
    )
    factor = schedule.lr_lambdas[0]
    return LambdaLR(optimizer, lambda step: factor(step + 1))


def check_optimization(
    optimizer: OptimizerSettings, scheduler: SchedulerSettings, precision: str, defense: Defense
) -> None:
    """Raises ValueError for values that the optimizer or the schedule refuse, before there is a model.

    So does what float16 refuses: see `check_loss_scale`.
    """
    parameter = nn.Parameter(torch.zeros(1))
    try:
        built = build_optimizer(optimizer, [parameter], optimizer.lr)
    except Exception as error:
        raise ValueError(f"optimizer: {optimizer.target}: {error}") from None
    try:
        build_schedule(scheduler, built, 100)
    except Exception as error:
        raise ValueError(f"scheduler: {scheduler.name}: {error}") from None
    if precision == "16-mixed":
        check_loss_scale(built, defense)


def check_loss_scale(optimizer: torch.optim.Optimizer, defense: Defense) -> None:
    """Raises ValueError for what is wrong under a loss that is scaled, as float16 needs it (`16-mixed`)."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            "trainer.precision=16-mixed does not work with a fused optimizer: its gradients are still those of the "
            "scaled loss where they are logged, clipped, or changed by a defense. Set optimizer.fused=false, or "
            "trainer.precision=bf16-mixed"
        )
    if defense.second_gradient:
        raise ValueError(f"defense={defense.name} does not work with trainer.precision=16-mixed: use bf16-mixed")
