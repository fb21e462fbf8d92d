"""One training run with Lightning: trainer, progress, checkpoints, the ledger on screen."""

from __future__ import annotations

import logging
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from secvec.data.datamodule import SecVecDataModule
from secvec.errors import ConfigError, DivergedError
from secvec.models.backbone import LedgerRow
from secvec.module import Loss, SecVecModule, local_shard
from secvec.runs.cache import main_process
from secvec.runs.console import table
from secvec.settings.schema import OptimizerSettings, SchedulerSettings, TrainerSettings
from secvec.tracking.base import Tracker
from secvec.tracking.stage_curves import StageCurves

log = logging.getLogger(__name__)


def fit(
    *, folder: Path, stage: str, seed: int, build: Callable[[], nn.Module], loss: Loss, part: str, lr: float,
    epochs: int, data: SecVecDataModule, optimizer: OptimizerSettings, scheduler: SchedulerSettings,
    trainer: TrainerSettings, tracker: Tracker, callbacks: list[L.Callback],
) -> SecVecModule:  # fmt: skip
    """Trains `part` of the model that `build` gives; a run that was cut off goes on from its last whole epoch.

    Raises DivergedError as soon as the loss is no number, and at the end for weights that are none.
    """
    L.seed_everything(seed, verbose=False)
    checkpoints = folder / "checkpoints" / stage
    last = checkpoints / "last.ckpt"
    resumed = last.is_file()
    module = SecVecModule(build, loss, part, lr, optimizer, scheduler, keep_start=bool(callbacks))
    keep = ModelCheckpoint(checkpoints, filename="last", save_top_k=1, every_n_epochs=1, enable_version_counter=False)
    runner = L.Trainer(
        **trainer_arguments(trainer),
        max_epochs=epochs,
        logger=StageCurves(tracker, stage, resumed),
        callbacks=[_Ledger(stage), _Finite(stage), StageProgress(stage), keep, *callbacks],
        default_root_dir=folder,
        enable_model_summary=False,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    if resumed:
        log.info("%s: going on from the last whole epoch (%s)", stage, last)
    try:
        runner.fit(module, data, ckpt_path=str(last) if resumed else None, weights_only=True if resumed else None)
    except SystemExit:
        if not runner.interrupted:
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored
        raise KeyboardInterrupt from None
    runner.strategy.barrier()
    if main_process():
        shutil.rmtree(checkpoints, ignore_errors=True)
        with suppress(OSError):
            checkpoints.parent.rmdir()  # another stage's may be there
    return module


def check_trainer(settings: TrainerSettings) -> None:
    """Raises ConfigError for hardware that is not here, before anything is built."""
    if settings.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError(
            "trainer.accelerator=gpu, but torch sees no GPU here: use trainer=cpu, or trainer.accelerator=cpu"
        )
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)


def device_of(settings: TrainerSettings) -> str:
    """Where this process evaluates."""
    if settings.accelerator == "cpu" or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def trainer_arguments(settings: TrainerSettings) -> dict[str, Any]:
    """Keyword arguments of Lightning's Trainer."""
    strategy: Any = settings.strategy
    if strategy == "fsdp":
        # FSDP2: the only sharding that takes mixed frozen and trainable weights as they are; sharded in configure_model
        devices = torch.cuda.device_count() if settings.devices == "auto" else settings.devices
        # Lightning's own sizes are one data-parallel group per node: every process would train on its own gradient
        strategy = ModelParallelStrategy(
            data_parallel_size=devices * settings.num_nodes, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    arguments = settings.model_dump(exclude={"num_threads"})
    return arguments | {"strategy": strategy}


class StageProgress(TQDMProgressBar):
    """The stage's name, epoch, rate and time left; readable in a pipe too."""

    def __init__(self, stage: str):
        super().__init__(refresh_rate=5, leave=False)
        self.stage = stage
        self.began = time.monotonic()

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """The bar of an epoch, named for the whole stage."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(f"{self.stage} {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """The loss and the time left of the whole stage; the bar's own is that of the epoch."""
        items = super().get_metrics(trainer, module)
        items.pop("v_num", None)
        done = trainer.global_step / max(1, trainer.estimated_stepping_batches)
        if done > 0:
            items["left"] = f"{(time.monotonic() - self.began) * (1 / done - 1):.0f}s"
        return items


class _Finite(L.Callback):
    """Stops a training that has diverged, on all processes at once: the others would wait for the one that raises."""

    def __init__(self, stage: str):
        self.stage = stage

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        """Before the weights are touched."""
        value = float(trainer.strategy.reduce(loss.detach(), reduce_op="mean"))
        if not math.isfinite(value):
            raise self._diverged(trainer, f"the loss is {value}")

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """The last step has no loss after it."""
        bad = sum(float((~local_shard(p).isfinite()).sum()) for _, p in module.trained())
        bad = float(trainer.strategy.reduce(torch.tensor(bad, device=module.device), reduce_op="sum"))
        if bad:
            raise self._diverged(trainer, "there are weights that are no finite numbers")

    def _diverged(self, trainer: L.Trainer, what: str) -> DivergedError:
        step, steps = trainer.global_step, int(trainer.estimated_stepping_batches)
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        return DivergedError(
            f"stage {self.stage} diverged: after {step} of {steps} steps {what} (learning rate {lr:.3g}). "
            f"Lower {RATES[self.stage.partition('-')[0]]}, or set trainer.gradient_clip_val. Nothing of it is saved"
        )


RATES = {"align": "model.align.lr", "vector": "vector.lr", "finetune": "optimizer.lr"}
"""The learning rate of each stage, and of its cycles (`finetune-2`)."""


class _Ledger(L.Callback):
    """Prints the parameter ledger once the module has asserted it, and keeps it."""

    def __init__(self, stage: str):
        self.stage = stage

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Shown by rank 0 alone."""
        show_ledger(self.stage, module.ledger())


@rank_zero_only
def show_ledger(stage: str, rows: list[LedgerRow]) -> None:
    """part, parameters, trainable or frozen, active or not."""
    cells = [
        [row.part, f"{row.parameters:,}", "trainable" if row.trainable else "frozen", "active" if row.active else "off"]
        for row in rows
    ]
    log.info("%s", table(f"{stage}: parameter ledger", ["part", "parameters", "weights", "in the forward pass"], cells))
