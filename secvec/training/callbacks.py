"""Callbacks of a training: those of the config, and the numbers that each training shows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from secvec.data.batch import Batch
from secvec.models.modes import in_eval
from secvec.settings.trainer import CallbackSettings

if TYPE_CHECKING:
    from secvec.module import SecVecModule


def build_callbacks(settings: Mapping[str, CallbackSettings], stage: str) -> list[L.Callback]:
    """A new object of each callback of `stage`: callbacks have a state, and every training needs a fresh one."""
    return [callback.build() for callback in settings.values() if stage in callback.stages]


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


class EverySteps(L.Callback):
    """Logs what `measure` finds before the first step, every `every_n_steps` optimizer steps, and after the last one.

    It leaves mode and random state of the model as they were, and so must `measure` leave weights and gradients.
    """

    prefix: ClassVar[str]
    """Of the logged names."""

    def __init__(self, every_n_steps: int):
        self.every_n_steps = every_n_steps
        self._last_step = -1

    def measure(self, trainer: L.Trainer, module: SecVecModule) -> dict[str, float]:
        """The values by name. Every process calls it."""
        raise NotImplementedError

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """The curves begin before the first step."""
        self.log_now(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an optimizer step, when the gradients have been used."""
        if trainer.global_step % self.every_n_steps == 0:
            self.log_now(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """The curves end after the last step."""
        self.log_now(trainer, module)

    def log_now(self, trainer: L.Trainer, module: SecVecModule) -> None:
        """Measures, unless it has after this step."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        devices = [module.device] if module.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), in_eval(module.model):
            values = self.measure(trainer, module)
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.prefix}/{name}": v for name, v in values.items()}, step=trainer.global_step)
