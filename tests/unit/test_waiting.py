"""Between two steps that are logged, a training reads nothing from the device, so the host never waits for it.

The device here is torch's `meta`: its tensors have shapes and no values, so whatever reads a value fails.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from in_memory import InMemory
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch.utils.data import DataLoader

from secvec.data.batch import Encoded
from secvec.data.datamodule import SecVecDataModule, training_loader
from secvec.defenses.base import Defense
from secvec.defenses.labelled_vector import LabelledVector
from secvec.models.packing import enable_packing
from secvec.models.tiny import build_tiny
from secvec.models.vector import attach_new_vector, merge_activation
from secvec.module import SecVecModule
from secvec.settings.schema import LoraSettings
from secvec.training.callbacks import TrainingMetrics
from secvec.training.trainer import StageProgress, StopWhenDiverged, Training

ROWS = [Encoded(list(range(3, 12 + i)), 4 + i % 3, undesired=i % 2 == 0) for i in range(60)]
LORA = {"r": 2, "alpha": 4, "target_modules": ["q_proj", "v_proj"]}


class Meta(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        pass


class OnMeta(SingleDeviceStrategy):
    def teardown(self) -> None:
        """Lightning would move the weights to the host."""


class Steps(L.Callback):
    def __init__(self) -> None:
        self.done = 0

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: STEP_OUTPUT, *args: Any) -> None:
        assert isinstance(outputs, dict) and outputs["loss"].is_meta
        self.done = trainer.global_step


@pytest.fixture(autouse=True)
def _number_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step Lightning asks all devices for it."""
    monkeypatch.setattr("lightning.pytorch.loops.fit_loop.has_len_all_ranks", lambda *_: True)


class Rows(SecVecDataModule):
    def __init__(self, accumulate: int):
        L.LightningDataModule.__init__(self)
        self.accumulate = accumulate

    def setup(self, stage: str) -> None:
        pass

    def train_dataloader(self) -> DataLoader:
        return training_loader([(ROWS, 6), (ROWS[:20], 3)], 0, accumulate=self.accumulate)

    def val_dataloader(self) -> list[Any]:
        return []


def steps_before_a_value_is_read(module: SecVecModule, log_every_n_steps: int, **given: Any) -> int:
    """Of 10 steps; a value is read at the end of the epoch at the latest."""
    steps, stop = Steps(), StopWhenDiverged(Training(Path(), "vector", "vector.lr", 0, 1, None))  # type: ignore[arg-type]
    trainer = L.Trainer(
        strategy=OnMeta(torch.device("meta"), Meta()), logger=False, max_epochs=1,
        callbacks=[steps, TrainingMetrics(), stop, StageProgress("vector")], enable_checkpointing=False,
        enable_model_summary=False, limit_val_batches=0, gradient_clip_val=1.0, use_distributed_sampler=False,
        log_every_n_steps=log_every_n_steps, **given,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="meta tensor"):
        trainer.fit(module, Rows(given.get("accumulate_grad_batches", 1)))
    return steps.done


def module(stage: str = "vector", **given: Any) -> SecVecModule:
    model, tokenizer = build_tiny(["some words", "and some more"], 0)
    assert enable_packing(model)  # transformers reads the mask of a padded batch
    if stage == "vector":
        given["vector"] = {**LORA, "kl_weight": 1.0}
    made = SecVecModule(stage, InMemory(model, tokenizer), **given)
    made.configure_model()
    return made


def test_the_vector_stage() -> None:
    assert steps_before_a_value_is_read(module(), 0) == 10


def test_a_step_that_is_logged_is_read() -> None:
    assert steps_before_a_value_is_read(module(), 4) == 4


def test_accumulated_gradients() -> None:
    assert steps_before_a_value_is_read(module(), 3, accumulate_grad_batches=2) == 3


@pytest.mark.parametrize("defense", [Defense(name="none"), LabelledVector(name="labelled_vector")])
def test_the_finetune_stage_with_a_vector_in_the_weights(monkeypatch: pytest.MonkeyPatch, defense: Defense) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is none for this device
    made = module("finetune", defense=Defense(name="none"))
    made.defense = defense
    made.model = attach_new_vector(made.model, LoraSettings(**LORA), 0.0)  # type: ignore[arg-type]
    merge_activation(made.model)
    for name, parameter in made.model.named_parameters():
        parameter.requires_grad = "lora" not in name
    assert steps_before_a_value_is_read(made, 0) == 10
