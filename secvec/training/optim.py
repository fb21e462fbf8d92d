"""The optimizer and the learning-rate schedule of a training, from its settings."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from secvec.settings.trainer import OptimizerSettings, SchedulerSettings


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


def check_optimization(optimizer: OptimizerSettings, scheduler: SchedulerSettings) -> None:
    """Raises ValueError for values that the optimizer or the schedule refuse, before there is a model."""
    parameter = nn.Parameter(torch.zeros(1))
    try:
        built = build_optimizer(optimizer, [parameter], optimizer.lr)
    except Exception as error:
        raise ValueError(f"optimizer: {optimizer.target}: {error}") from None
    try:
        build_schedule(scheduler, built, 100)
    except Exception as error:
        raise ValueError(f"scheduler: {scheduler.name}: {error}") from None
