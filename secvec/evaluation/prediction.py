"""`trainer.predict` over batches that are made already, with the outputs of all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import lightning as L
import torch.distributed as dist
from lightning.pytorch.callbacks import TQDMProgressBar

from secvec.data.prompts import Question, loader
from secvec.evaluation.generation import RunningEngine
from secvec.settings.schema import EvaluationSettings
from secvec.settings.trainer import TrainerSettings
from secvec.training.trainer import interruptible

if TYPE_CHECKING:
    from secvec.module import SecVecModule


class PredictBatch(Protocol):
    """A batch for `SecVecModule.predict_step`, which returns what `predict` returns."""

    def predict(self, module: SecVecModule) -> list[Any]:
        """The outputs of the batch."""


class Nothing:
    """The batch of a process that has no batch: Lightning expects at least one."""

    def predict(self, module: SecVecModule) -> list[Any]:
        """No output."""
        return []


def predict(
    module: SecVecModule,
    batches: Sequence[Sequence[PredictBatch]],
    settings: TrainerSettings,
    label: str,
    callbacks: Sequence[L.Callback] = (),
) -> list[list[Any]]:
    """The outputs for each sequence of batches, those of all processes together. Every process must call it.

    Each process holds the whole model, under `strategy=fsdp` too: the processes share out the batches, not the weights.
    """
    trainer = L.Trainer(
        **settings.hardware() | {"strategy": "auto" if settings.strategy == "auto" else "ddp"},
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[PredictProgress(label), *callbacks],
    )
    with interruptible(trainer):
        outputs: Any = trainer.predict(module, [loader(mine or [Nothing()]) for mine in batches])
    by_loader = outputs if len(batches) > 1 else [outputs]
    return [gathered([item for output in outputs for item in output]) for outputs in by_loader]


def respond(
    module: SecVecModule,
    questions: Sequence[Question],
    settings: EvaluationSettings,
    trainer: TrainerSettings,
    label: str,
) -> list[list[str]]:
    """The responses of `module` to each question, in the order of its prompts. Every process must call it."""
    batches = [q.batches(module, settings.batch_size, settings.max_new_tokens) for q in questions]
    outputs = predict(module, batches, trainer, f"generate {label}", [RunningEngine()])
    return [[row["response"] for row in sorted(rows, key=lambda row: row["row"])] for rows in outputs]


def gathered(items: list[Any]) -> list[Any]:
    """The items of all processes, on all of them."""
    if not dist.is_initialized():
        return items
    parts: list[list[Any]] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


class PredictProgress(TQDMProgressBar):
    """A progress bar that says what is generated or measured."""

    def __init__(self, label: str):
        super().__init__()
        self.label = label

    @property
    def predict_description(self) -> str:
        """The label, for every batch."""
        return self.label

    def init_predict_tqdm(self) -> Any:
        """A bar that goes when it is full; `TQDMProgressBar(leave=False)` is about training alone."""
        bar = super().init_predict_tqdm()
        bar.leave = False
        return bar
