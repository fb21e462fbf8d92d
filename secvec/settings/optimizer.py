"""The optimizer and the learning-rate schedule of every stage."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from pydantic import Field, model_validator

from secvec.errors import nearest
from secvec.settings.schema import Rate, Settings, Share
from secvec.settings.target import Target, check_arguments


class OptimizerSettings(Target):
    """An optimizer of torch, or any class derived from its base, with its arguments."""

    base = "torch.optim.Optimizer"
    ours = ("params", "lr")

    lr: Rate
    """Of the finetune stage; those of the others are `vector.lr` and `model.align.lr`."""


class SchedulerSettings(Settings):
    """The learning rate over the optimizer steps of a stage: a schedule of transformers (`get_scheduler`)."""

    name: str
    warmup_ratio: Share
    """Share of the steps in which the rate rises to its full value."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Arguments that the schedule has beside the numbers of steps: `num_cycles`, `min_lr_rate`, ..."""

    @model_validator(mode="after")
    def _is_a_schedule(self) -> SchedulerSettings:
        known = schedules()
        if self.name not in known:
            names = ", ".join(known)
            raise ValueError(f"name: there is no schedule {self.name!r}{nearest(self.name, known)}; allowed: {names}")
        ours = ("optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")
        check_arguments(self.name, known[self.name], self.options, ours)
        if self.warmup_ratio and "num_warmup_steps" not in inspect.signature(known[self.name]).parameters:
            raise ValueError(f"{self.name} has no warm-up: choose {self.name}_with_warmup, or warmup_ratio=0")
        return self


def schedules() -> dict[str, Callable]:
    """The schedules of transformers by name, but for those that follow a metric and not the step."""
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION  # slow to import

    functions: dict[Any, Callable] = TYPE_TO_SCHEDULER_FUNCTION  # type: ignore[assignment]
    return {kind.value: f for kind, f in functions.items() if "last_epoch" in inspect.signature(f).parameters}
