"""One training run with Lightning: trainer, progress, checkpoints, the ledger on screen."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from secvec.errors import ArtifactError, ConfigError, DivergedError, one_line
from secvec.models.sharding import local_shard
from secvec.runs.console import table
from secvec.runs.processes import from_first
from secvec.settings.trainer import CheckpointSettings, TrainerSettings
from secvec.training.callbacks import TrainingMetrics, logged
from secvec.training.checkpoints import (
    CheckpointFile,
    LastCheckpoint,
    ShardedStrategy,
    is_whole,
    newest,
    remove_leftovers,
)

log = logging.getLogger(__name__)


EVERY_EPOCH = CheckpointSettings(every_n_epochs=1, every_n_steps=None, every_n_minutes=None)


@dataclass(frozen=True)
class Training:
    """One training of a run: where it keeps its checkpoints, how it is called, how long it goes on."""

    folder: Path
    label: str
    """Its name in logs, curves and checkpoints: `vector`, `finetune`, `finetune-2` (a cycle), `align`."""
    learning_rate: str
    """The setting to lower when it diverges."""
    seed: int
    epochs: int
    trainer: TrainerSettings
    validates: bool = True
    """Whether the validation loop runs at the end of each epoch."""
    checkpoint: CheckpointSettings = EVERY_EPOCH

    @property
    def checkpoints(self) -> Path:
        """Where it keeps them until it ends."""
        return self.folder / "checkpoints" / self.label

    @property
    def resumes(self) -> bool:
        """Whether an earlier try left a checkpoint."""
        return newest(self.checkpoints) is not None

    def begins_at(self) -> Path | None:
        """The checkpoint that it goes on from; None: there is none. What a killed process left beside it is removed.

        Raises ArtifactError for a damaged one.
        """
        found = newest(self.checkpoints)
        if found and not is_whole(found):
            raise ArtifactError(
                f"{self.label} cannot go on: {found} is cut short or damaged. Remove the folder {self.checkpoints}, "
                "and the training starts over"
            )
        remove_leftovers(self.checkpoints, found)
        return found


def fit(
    module: Any,
    data: L.LightningDataModule | DataLoader,
    training: Training,
    logger: Logger,
    out: Path,
    callbacks: Sequence[L.Callback] = (),
) -> int:
    """Trains `module` and saves it below `out`; a training that was cut off goes on from its last checkpoint.

    Its checkpoints stay: who keeps the result removes them. Returns the bytes of those that were written.

    Raises DivergedError for a loss or weights that are no finite numbers (see `StopWhenDiverged`), ArtifactError for
    a damaged checkpoint.
    """
    L.seed_everything(training.seed, verbose=False)
    last, keep = from_first(training.begins_at), LastCheckpoint(training.checkpoints, training.checkpoint)
    arguments = training.trainer.arguments(training.epochs)
    if training.trainer.strategy == "fsdp":
        arguments["strategy"] = ShardedStrategy(*training.trainer.mesh())
    plugins = arguments.get("plugins") or []
    arguments["plugins"] = [CheckpointFile(), *(plugins if isinstance(plugins, list) else [plugins])]
    if not training.validates:
        arguments["limit_val_batches"] = 0
    progress = [] if arguments.get("enable_progress_bar") is False else [StageProgress(training.label)]
    ours = [TrainingMetrics(), ShowLedger(training.label), StopWhenDiverged(training), *progress, keep]
    runner = L.Trainer(**arguments, logger=logger, callbacks=[*ours, *callbacks], default_root_dir=training.folder)
    if last:
        log.info("%s: going on from the last checkpoint (%s)", training.label, last)
    with interruptible(runner):
        try:
            runner.fit(module, data, ckpt_path=last and str(last), weights_only=True if last else None)
        except MisconfigurationException as error:
            raise ConfigError(f"stage {training.label}: the Trainer refuses its settings: {one_line(error)}") from None
    module.save(out)
    return keep.written


@contextmanager
def interruptible(trainer: L.Trainer) -> Iterator[None]:
    """Inside, Ctrl-C raises KeyboardInterrupt. Lightning would exit with code 1 and leave SIGINT ignored."""
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from None


def launch(settings: TrainerSettings) -> None:
    """Starts all processes of the run and joins them, so that every stage has them, the first one too.

    Before it there is one process on each node (unless torchrun or SLURM started all). It
    runs the same command again for each of its other devices.
    """
    if settings.strategy != "auto" and not dist.is_initialized():
        L.Fabric(**settings.hardware() | {"strategy": "ddp"}).launch()


def check_trainer(settings: TrainerSettings, num_threads: int | None) -> None:
    """Raises ConfigError for hardware that is not here, before anything is built."""
    if settings.accelerator == "gpu" and not torch.cuda.is_available():
        raise ConfigError(
            "trainer.accelerator=gpu, but torch sees no GPU here: use trainer=cpu, or trainer.accelerator=cpu"
        )
    if settings.precision == "16-mixed" and device_type(settings) == "cpu":  # Lightning would take bfloat16
        raise ConfigError("trainer.precision=16-mixed needs a GPU: use trainer.precision=bf16-mixed")
    if num_threads:
        torch.set_num_threads(num_threads)


def device_of(settings: TrainerSettings) -> str:
    """Where this process evaluates."""
    if settings.accelerator == "cpu" or not torch.cuda.is_available():
        return "cpu"
    rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = settings.devices if isinstance(settings.devices, list) else range(torch.cuda.device_count())
    return f"cuda:{gpus[rank % len(gpus)]}"


def device_type(settings: TrainerSettings) -> str:
    """`cpu` or `cuda`, for keys: `trainer.accelerator=auto` counts as the device that it finds."""
    return device_of(settings).partition(":")[0]


def precision_on_cpu(precision: str) -> Precision:
    """How Lightning computes in this `trainer.precision`, on the CPU; float16 as bfloat16, which has the same bytes."""
    plugins: dict[str, Callable[[], Precision]] = {
        "32-true": Precision,
        "64-true": DoublePrecision,
        "bf16-true": partial(HalfPrecision, "bf16-true"),
    }
    return plugins.get(precision, partial(MixedPrecision, "bf16-mixed", "cpu"))()


class StageProgress(TQDMProgressBar):
    """The stage's name, epoch, rate and time left; readable in a pipe too."""

    def __init__(self, stage: str):
        super().__init__(refresh_rate=5, leave=False)
        self.stage = stage
        self.began = time.monotonic()
        self.loss = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """The bar of an epoch, named for the whole stage."""
        super().on_train_epoch_start(trainer, *args)
        self.train_progress_bar.set_description(f"{self.stage} {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Reads the loss after a step that is logged, which waits for the device anyway."""
        if logged(trainer, batch_idx):
            self.loss = float(outputs["loss"]) * trainer.accumulate_grad_batches  # Lightning has divided it
        super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    def get_metrics(self, trainer: L.Trainer, module: L.LightningModule) -> dict[str, Any]:
        """The loss and the time left of the whole stage; the bar's own is that of the epoch."""
        items = super().get_metrics(trainer, module)
        items.pop("v_num", None)
        items["loss"] = self.loss
        done = trainer.global_step / max(1, trainer.estimated_stepping_batches)
        if done > 0:
            items["left"] = f"{(time.monotonic() - self.began) * (1 / done - 1):.0f}s"
        return items


class StopWhenDiverged(L.Callback):
    """Stops a training that has diverged, on all processes at once: the others would wait for the one that raises.

    The losses stay on the device until a step that is logged, so that no other step waits for it. All are looked at,
    and the weights with them, before a checkpoint is written, and before the result is saved.
    """

    def __init__(self, training: Training):
        self.training = training
        self.losses: list[tuple[int, float, Tensor]] = []
        """Steps before it, learning rate, and value of each loss since they were looked at."""

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        """No checkpoint is made of bad weights, by whichever callback."""
        module.before_checkpoint = partial(self.check, trainer, module)

    def on_before_backward(self, trainer: L.Trainer, module: L.LightningModule, loss: Tensor) -> None:
        """Keeps the loss of a batch."""
        self.losses.append((trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"], loss.detach()))

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Looks at the losses after a step that is logged."""
        if logged(trainer, batch_idx):
            self.check_losses(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        """The last step has no loss after it."""
        self.check(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """A training that ends within an epoch."""
        self.check(trainer, module)

    def check_losses(self, trainer: L.Trainer) -> None:
        """Raises DivergedError for the first loss that is no finite number on some process."""
        kept, self.losses = self.losses, []
        if not kept:
            return
        values = trainer.strategy.reduce(torch.stack([loss for *_, loss in kept]), reduce_op="mean").tolist()
        for (step, lr, _), value in zip(kept, values, strict=True):
            if not math.isfinite(value):
                raise self._diverged(trainer, step, lr, f"the loss is {value}")

    def check(self, trainer: L.Trainer, module: Any) -> None:
        """As `check_losses`, and for weights that are no finite numbers."""
        self.check_losses(trainer)
        bad = torch.stack([(~local_shard(p).isfinite()).any() for _, p in module.trained()]).any().float()
        if float(trainer.strategy.reduce(bad, reduce_op="sum")):
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            raise self._diverged(trainer, trainer.global_step, lr, "some weights are NaN or infinite")

    def _diverged(self, trainer: L.Trainer, step: int, lr: float, what: str) -> DivergedError:
        steps = int(trainer.estimated_stepping_batches)
        if step == 0:
            return DivergedError(
                f"stage {self.training.label} cannot start: before the first step {what}. The model's weights are "
                f"damaged, or trainer.precision={self.training.trainer.precision} is too small for it"
            )
        return DivergedError(
            f"stage {self.training.label} diverged: after {step} of {steps} steps {what} (learning rate {lr:.3g}). "
            f"Lower {self.training.learning_rate}, or set trainer.gradient_clip_val. Nothing of it is saved"
        )


class ShowLedger(L.Callback):
    """Prints the parameter ledger once the module has asserted it."""

    def __init__(self, stage: str):
        self.stage = stage

    @rank_zero_only
    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Part, parameters, trainable or frozen, active or not."""
        cells = [
            [of.part, f"{of.parameters:,}", "trainable" if of.trainable else "frozen", "active" if of.active else "off"]
            for of in module.ledger()
        ]
        head = ["part", "parameters", "weights", "in the forward pass"]
        log.info("%s", table(f"{self.stage}: parameter ledger", head, cells))
