"""`trainer.predict` over batches that are made already, with the outputs of all processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from secvec.data.prompts import Answer, PromptSet, loader
from secvec.models.sharding import in_step
from secvec.runs.processes import gathered
from secvec.settings.schema import EvaluationSettings
from secvec.settings.trainer import TrainerSettings
from secvec.training.trainer import interruptible

if TYPE_CHECKING:
    from secvec.module import SecVecModule


PredictBatch = Callable[["SecVecModule"], list[Any]]
"""A batch for `SecVecModule.predict_step`: called with the module, it returns its outputs."""


class Inside(L.Callback):
    """Keeps a context open while `trainer.predict` goes through the batches: `enter(module)` makes it."""

    def __init__(self, enter: Callable[[SecVecModule], AbstractContextManager[None]]):
        self.enter, self.context = enter, ExitStack()

    def on_predict_start(self, trainer: L.Trainer, module: Any) -> None:
        """The model is where it runs."""
        self.context.enter_context(self.enter(module))

    def on_predict_end(self, trainer: L.Trainer, module: Any) -> None:
        """All batches are done."""
        self.context.close()

    def on_exception(self, trainer: L.Trainer, module: Any, exception: BaseException) -> None:
        """It ends in any case."""
        self.context.__exit__(type(exception), exception, exception.__traceback__)


def predict(
    module: SecVecModule,
    batches: Sequence[Sequence[PredictBatch]],
    settings: TrainerSettings,
    label: str,
    callbacks: Sequence[L.Callback] = (),
) -> list[list[Any]]:
    """The outputs for each sequence of batches, those of all processes together. Every process must call it.

    The processes share out the batches, and under `strategy=fsdp` the weights too: none holds the whole model.
    """
    trainer = L.Trainer(
        **settings.hardware() | ({"strategy": "ddp"} if settings.strategy.startswith("ddp") else {}),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=settings.strategy != "fsdp",  # what FSDP2 gathers in it could not be written to outside of it
        callbacks=[PredictProgress(label), Inside(lambda module: in_step(module.model)), *callbacks],
    )
    with interruptible(trainer):
        # Lightning expects at least one batch in every process
        outputs: Any = trainer.predict(module, [loader(mine or [lambda module: []]) for mine in batches])
    by_loader = outputs if len(batches) > 1 else [outputs]
    return [gathered([item for output in outputs for item in output]) for outputs in by_loader]


def respond(
    module: SecVecModule,
    prompts: Sequence[PromptSet],
    settings: EvaluationSettings,
    trainer: TrainerSettings,
    label: str,
) -> list[list[str]]:
    """The texts of `answers`."""
    return [[answer.text for answer in some] for some in answers(module, prompts, settings, trainer, label)]


def answers(
    module: SecVecModule,
    prompts: Sequence[PromptSet],
    settings: EvaluationSettings,
    trainer: TrainerSettings,
    label: str,
) -> list[list[Answer]]:
    """The answers of `module` to each set of prompts, in their order. Every process must call it."""
    batches = [q.batches(module, settings.batch_size, settings.max_new_tokens) for q in prompts]
    running = Inside(lambda module: module.generation.running(module.model))
    outputs = predict(module, batches, trainer, f"generate {label}", [running])
    by_place = [sorted(rows, key=lambda row: row["row"]) for rows in outputs]
    return [[Answer(row["response"], row["cut"]) for row in rows] for rows in by_place]


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
