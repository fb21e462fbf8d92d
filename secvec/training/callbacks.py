"""Callbacks of a training: those of the config, and the numbers that each training shows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.distributed.tensor import DTensor

from secvec.data.batch import Batch
from secvec.errors import ConfigError
from secvec.settings.trainer import CallbackSettings


def build_callbacks(settings: Mapping[str, CallbackSettings], stage: str) -> list[L.Callback]:
    """A new object of each callback of `stage`: callbacks have a state, and every training needs a fresh one.

    Raises ConfigError for one that would change how many batches a step has: a batch knows the tokens of its step.
    """
    built = [callback.build() for callback in settings.values() if stage in callback.stages]
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in built):
        raise ConfigError("callbacks: GradientAccumulationScheduler: set trainer.accumulate_grad_batches instead")
    return built


def logs(trainer: L.Trainer, step: int) -> bool:
    """Whether `step`, counted from 1, is one of every `trainer.log_every_n_steps`: only then the host reads values."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step % every == 0


def logged(trainer: L.Trainer, batch_idx: int) -> bool:
    """At the end of a batch: whether it was the last one of a step that is logged."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and logs(trainer, trainer.global_step)


class TrainingMetrics(L.Callback):
    """Logs every `trainer.log_every_n_steps` optimizer steps, without a change to the training:

    - `train/learning_rate`: that the step was made with;
    - `train/gradient_norm`: 2-norm of the gradient of all trained parameters, before clipping and before a defense
      changes it;
    - `train/tokens_per_second`: tokens over all processes, padding not counted, per second of the steps since the last
      time;
    - `train/epoch`: passes over the data so far, as a fraction.
    """

    def __init__(self) -> None:
        self.tokens: Tensor | int = 0
        self.seconds = 0.0
        self.values: dict[str, Any] = {}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Batch, batch_idx: int) -> None:
        """Starts the clock."""
        self.began = time.perf_counter()

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        """Takes the norm; Lightning clips after this."""
        if not logs(trainer, trainer.global_step + 1):
            return
        groups = optimizer.param_groups
        norm = torch.nn.utils.get_total_norm([p.grad for g in groups for p in g["params"] if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.values = {"train/learning_rate": groups[0]["lr"], "train/gradient_norm": norm}

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Logs the values after the last batch of such a step. `module.log` would take longer than all else here."""
        self.tokens += batch["attention_mask"].sum()
        values = {name: float(value) for name, value in self.values.items()}  # waits for the GPU
        self.seconds += time.perf_counter() - self.began
        if not values:
            return
        rate = torch.as_tensor(self.tokens / self.seconds, device=module.device)
        epoch = trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches
        values["train/tokens_per_second"] = float(trainer.strategy.reduce(rate, reduce_op="sum"))
        values["train/epoch"] = epoch
        self.tokens, self.seconds, self.values = 0, 0.0, {}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)
