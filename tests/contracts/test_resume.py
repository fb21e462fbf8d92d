"""A training that is cut off within an epoch ends with the weights of one that was not, to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from in_memory import InMemory
from lightning.pytorch.loggers.logger import DummyLogger
from pydantic import ValidationError
from torch.utils.data import DataLoader

from secvec.data.batch import Encoded
from secvec.data.datamodule import training_loader
from secvec.models.tiny import build_tiny
from secvec.module import SecVecModule
from secvec.settings.trainer import CheckpointSettings, TrainerSettings
from secvec.training.checkpoints import LastCheckpoint
from secvec.training.trainer import Training, fit

ROWS = [Encoded(list(range(3, 10 + i % 5)), 3 + i % 2) for i in range(24)]
NEVER = 10**6
STEPS = 4
"""Of an epoch; there are three."""


class Cut(Exception):
    pass


class CutOff(L.Callback):
    """Raises after `step` optimizer steps: before any later checkpoint."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise Cut


def checkpoints(**given: Any) -> CheckpointSettings:
    return CheckpointSettings(**{"every_n_epochs": None, "every_n_steps": None, "every_n_minutes": None, **given})


def loader(accumulate: int) -> DataLoader:
    return training_loader([(ROWS, 6 // accumulate), (ROWS[:7], 3)], 0, accumulate=accumulate)


def train(
    folder: Path, settings: CheckpointSettings, cut: int = NEVER, accumulate: int = 1, more: Sequence[L.Callback] = ()
) -> tuple[Any, int]:
    """The trained weights, and the bytes of the checkpoints."""
    model, tokenizer = build_tiny(["some words", "and some more"], 0)
    lora = {"r": 2, "alpha": 4, "target_modules": ["q_proj"], "dropout": 0.5, "kl_weight": 1.0}
    module = SecVecModule("vector", InMemory(model, tokenizer), vector=lora)
    module.save = lambda _: None  # type: ignore[method-assign]
    trainer = TrainerSettings(
        accelerator="cpu", devices=1, strategy="auto", precision="32-true", gradient_clip_val=None,
        accumulate_grad_batches=accumulate, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    training = Training(folder, "vector", "vector.lr", 0, 3, trainer, False, settings)
    written = fit(module, loader(accumulate), training, DummyLogger(), folder, [CutOff(cut), *more])  # type: ignore[arg-type]
    shutil.rmtree(training.checkpoints, ignore_errors=True)  # as who keeps the result does
    return {name: p.detach().clone() for name, p in module.trained()}, written


def cut_and_go_on(folder: Path, settings: CheckpointSettings, cut: int, accumulate: int) -> tuple[Any, int]:
    """The step of the checkpoint that it goes on from."""
    with pytest.raises(Cut):
        train(folder, settings, cut, accumulate)
    kept = torch.load(folder / "checkpoints" / "vector" / "last.ckpt", weights_only=True)
    return train(folder, settings, NEVER, accumulate)[0], kept["global_step"]


@pytest.mark.parametrize(
    ("settings", "cut", "begins", "accumulate"),
    [
        (checkpoints(every_n_steps=3), 8, 6, 1),  # within the second epoch
        (checkpoints(every_n_steps=2), 9, 8, 2),  # at its end
        (checkpoints(every_n_epochs=1, every_n_steps=5), 5, 5, 1),
        (checkpoints(every_n_minutes=1e-9), 7, 7, 2),
    ],
)
def test_the_weights_are_those_of_a_training_that_was_not_cut(
    tmp_path: Path, settings: CheckpointSettings, cut: int, begins: int, accumulate: int
) -> None:
    whole, _ = train(tmp_path / "whole", checkpoints(every_n_epochs=1), accumulate=accumulate)
    found, step = cut_and_go_on(tmp_path / "cut", settings, cut, accumulate)
    assert step == begins
    assert all(torch.equal(found[name], weights) for name, weights in whole.items())


def test_without_the_place_in_the_data_they_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = train(tmp_path / "whole", checkpoints(every_n_epochs=1))
    monkeypatch.setattr(SecVecModule, "on_train_start", lambda *_: None)
    found, _ = cut_and_go_on(tmp_path / "cut", checkpoints(every_n_steps=3), 8, 1)
    assert not all(torch.equal(found[name], weights) for name, weights in whole.items())


class StopsEarly(L.Callback):
    """Ends the training after the first epoch, as early stopping does; may raise when it has ended."""

    def __init__(self, cut: bool):
        self.cut = cut

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop |= trainer.current_epoch == 0

    def on_train_end(self, *args: Any) -> None:
        if self.cut:
            raise Cut


def test_a_training_that_a_callback_had_ended_stays_ended(tmp_path: Path) -> None:
    """Cut off before its result is saved, it goes on with the saving."""
    whole, _ = train(tmp_path / "whole", checkpoints(every_n_epochs=1), more=[StopsEarly(False)])
    with pytest.raises(Cut):
        train(tmp_path / "cut", checkpoints(every_n_epochs=1), more=[StopsEarly(True)])
    found, written = train(tmp_path / "cut", checkpoints(every_n_epochs=1), more=[StopsEarly(False)])
    assert all(torch.equal(found[name], weights) for name, weights in whole.items()) and not written


def test_what_was_written_is_counted(tmp_path: Path) -> None:
    """One for every epoch, or for every second step: 3 and 6 of about the same size."""
    _, by_epochs = train(tmp_path, checkpoints(every_n_epochs=1))
    _, by_steps = train(tmp_path, checkpoints(every_n_steps=2))
    assert train(tmp_path, checkpoints(every_n_epochs=4))[1] == 0
    assert by_epochs / 3 == pytest.approx(by_steps / 6, rel=0.05) and by_epochs > 0


def test_a_training_without_checkpoints_is_refused() -> None:
    with pytest.raises(ValidationError, match="set one of every_n_epochs"):
        checkpoints()


def test_minutes_are_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("secvec.training.checkpoints.time.monotonic", lambda: clock[0])
    given = CheckpointSettings(every_n_epochs=None, every_n_steps=None, every_n_minutes=2)
    callback, saved = LastCheckpoint(tmp_path, given), []
    monkeypatch.setattr(callback, "_save", lambda *_: saved.append(clock[0]))
    strategy = SimpleNamespace(broadcast=lambda late: late)
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=1, global_step=1, strategy=strategy, num_training_batches=9, should_stop=False
    )
    callback.on_train_start(trainer, None)
    for clock[0] in (3.0, 119.0, 120.0):
        callback.on_train_batch_end(trainer, None, None, None, 0)
    assert saved == [120.0]
