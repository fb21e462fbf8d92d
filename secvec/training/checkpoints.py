"""Checkpoints of a training: when one is written, where, and how. The last one is kept, whole or not at all."""

from __future__ import annotations

import os
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from secvec.runs.files import atomic_path
from secvec.runs.processes import main_process
from secvec.settings.trainer import CheckpointSettings

REST = "meta.pt"
"""In a folder of shards, what is no weight and no moment of the optimizer. Lightning's name."""


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` as often as the settings say, after whole optimizer steps.

    A new one takes the place of the one before when it is whole, so the disk holds two while it is written. They hold
    what is trained, its optimizer state, and the place in the data. Of a sharded model it is a folder, in which each
    process writes its shards.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings):
        self.path, self.settings = folder / "last.ckpt", settings
        self.written = 0
        """Bytes of all checkpoints."""
        self._step, self._time, self._due = 0, time.monotonic(), False
        self._stopped = False

    def on_load_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Remembers whether a callback had ended the training."""
        self._stopped = checkpoint.get("stopped", False)

    def on_save_checkpoint(self, trainer: L.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        """Adds whether the training has ended, which Lightning forgets."""
        checkpoint["stopped"] = trainer.should_stop

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """Ends a training that had ended."""
        self._step, self._time = trainer.global_step, time.monotonic()
        trainer.should_stop |= self._stopped

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Within an epoch. After its last step it is saved as at the end of an epoch."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        steps, minutes = self.settings.every_n_steps, self.settings.every_n_minutes
        self._due = steps is not None and trainer.global_step % steps == 0
        if minutes:
            late = time.monotonic() - self._time >= 60 * minutes
            self._due |= trainer.strategy.broadcast(late)
        if self._due and batch_idx + 1 < trainer.num_training_batches:
            self._save(trainer, module)

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        """After an epoch."""
        every = self.settings.every_n_epochs
        if self._due or (every and (trainer.current_epoch + 1) % every == 0):
            self._save(trainer, module)

    def _save(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.fast_dev_run or trainer.global_step == self._step:  # type: ignore[attr-defined]
            return
        module.before_checkpoint()
        strategy = trainer.strategy
        with strategy.by_shards() if isinstance(strategy, ShardedStrategy) else nullcontext():
            trainer.save_checkpoint(self.path)
        self.written += sum(file.stat().st_size for file in _files(self.path)) if main_process() else 0
        self._step, self._time, self._due = trainer.global_step, time.monotonic(), False


def newest(folder: Path) -> Path | None:
    """The checkpoint that an earlier try left in `folder`; None: there is none."""
    # a folder takes the place of another in two steps: what a kill between them leaves (see `atomic_path`)
    found = [file for name in ("last.ckpt", ".last.ckpt.*/before") for file in folder.glob(name)]
    return found[0] if found else None


def is_whole(checkpoint: Path) -> bool:
    """Whether the parts of a checkpoint are there with the right checksums; of a folder, whether all shards are."""
    try:
        if checkpoint.is_dir() and not {".metadata", REST} <= {file.name for file in _files(checkpoint)}:
            return False
        with zipfile.ZipFile(checkpoint / REST if checkpoint.is_dir() else checkpoint) as parts:
            return parts.testzip() is None
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error):
        return False


def remove_leftovers(folder: Path, used: Path | None) -> None:
    """Removes what was being written in `folder` when a process was killed, except the checkpoint that is `used`."""
    for leftover in folder.glob(".*.*/"):
        if not used or used.parent != leftover:
            shutil.rmtree(leftover, ignore_errors=True)


def _files(checkpoint: Path) -> list[Path]:
    return list(checkpoint.iterdir()) if checkpoint.is_dir() else [checkpoint]


class CheckpointFile(TorchCheckpointIO):
    """Writes a checkpoint straight to its disk. Lightning's own makes a copy in memory, and another one below /tmp."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Writes the file, which then is safe from a loss of power; nothing of it is left when this fails."""
        with atomic_path(Path(path)) as part, part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 with checkpoints that no process holds whole. One of another number of processes can be read too.

    Lightning has such checkpoints, but reads into all weights of a model; ours hold what is trained.
    """

    def __init__(self, data_parallel_size: int, tensor_parallel_size: int):
        super().__init__(data_parallel_size, tensor_parallel_size, save_distributed_checkpoint=False)

    @contextmanager
    def by_shards(self) -> Iterator[None]:
        """Inside, a checkpoint is a folder of shards; elsewhere, one file that the first process writes."""
        self._save_distributed_checkpoint = True
        try:
            yield
        finally:
            self._save_distributed_checkpoint = False

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Every process must call it."""
        if not self._save_distributed_checkpoint:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        path = Path(filepath)
        with atomic_path(path) if self.is_global_zero else nullcontext(path) as part:
            super().save_checkpoint(checkpoint, part, storage_options)  # the first process tells the others the path
            self.barrier()
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads the shards of this process into the model and its optimizer; returns the rest."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_file():
            return super().load_checkpoint(path, weights_only)
        assert self.model is not None
        known = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        weights = get_model_state_dict(self.model)
        weights = {name: weight for name, weight in weights.items() if f"state_dict.{name}" in known}
        dcp.load({"state_dict": weights}, checkpoint_id=path)  # in place
        for number, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{number}": get_optimizer_state_dict(self.model, optimizer)}
            dcp.load(state, checkpoint_id=path)
            set_optimizer_state_dict(self.model, optimizer, state[f"optimizer_{number}"])
        rest: dict[str, Any] = torch.load(path / REST, weights_only=weights_only)
        return rest
