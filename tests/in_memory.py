"""Questions to a model in memory, by the classes that the stages use: a module around it, an evaluator, a trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from secvec.behaviors.base import Behavior
from secvec.data.example import Example
from secvec.data.prompts import PromptSet, prompt_set
from secvec.evaluation.evaluator import Evaluator
from secvec.evaluation.generation import GenerationBackend
from secvec.evaluation.losses import sample_losses
from secvec.evaluation.prediction import respond
from secvec.evaluation.verdicts import EvaluationResult
from secvec.judges.base import Judge
from secvec.metrics import Measurement, mean
from secvec.models.backbone import Backbone, context_of
from secvec.module import SecVecModule
from secvec.settings.schema import EvaluationSettings, ModelSettings
from secvec.settings.trainer import TrainerSettings

IN_MEMORY = GenerationBackend()
ON_CPU = TrainerSettings(accelerator="cpu", devices=1, strategy="auto", precision="32-true", gradient_clip_val=None)


class InMemory(Backbone):
    """A model and a tokenizer that are in no folder."""

    def __init__(self, model: nn.Module, tokenizer: Any, **settings: Any):
        super().__init__(Path("in-memory"), ModelSettings(name="in-memory", name_or_path="in-memory", **settings))
        self.__dict__.update(model=model, tokenizer=tokenizer, context=context_of(model.config))

    def load(self) -> Any:
        return self.__dict__["model"]

    outline = load


def module(model: nn.Module, tokenizer: Any, generation: GenerationBackend = IN_MEMORY) -> SecVecModule:
    """It answers as `model` does, with what is attached to it. Kept answers are read from disk again."""
    made = SecVecModule("infer", InMemory(model, tokenizer))
    made.generation = replace(generation)
    return made


def complete(
    model: nn.Module,
    tokenizer: Any,
    asked: PromptSet,
    settings: EvaluationSettings,
    generation: GenerationBackend = IN_MEMORY,
    trainer: TrainerSettings = ON_CPU,
) -> list[str]:
    """The responses to `asked`, in the order of its prompts."""
    (responses,) = respond(module(model, tokenizer, generation), [asked], settings, trainer, "test")
    return responses


def generate(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    settings: EvaluationSettings,
    generation: GenerationBackend = IN_MEMORY,
    trainer: TrainerSettings = ON_CPU,
) -> list[str]:
    """Greedy responses to `examples`, in their order."""
    return complete(model, tokenizer, prompt_set(examples, tokenizer), settings, generation, trainer)


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tests: Mapping[str, Sequence[Example]],
    behavior: Behavior,
    settings: EvaluationSettings,
    phase: str,
    generation: GenerationBackend = IN_MEMORY,
    leaks: bool = False,
    judge: Judge | None = None,
    context: Sequence[Example] = (),
) -> EvaluationResult:
    """All that an evaluation measures; with `leaks`, by leak probes too."""
    asking = Evaluator(tests, behavior, judge, settings, ON_CPU, context=context)
    return asking.evaluate(module(model, tokenizer, generation), phase, leaks)


def leaks(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    behavior: Behavior,
    settings: EvaluationSettings,
    phase: str,
) -> EvaluationResult:
    """What the leak probes alone measure."""
    whole = evaluate(model, tokenizer, {"undesired": examples}, behavior, settings, phase, leaks=True)
    plain = evaluate(model, tokenizer, {"undesired": examples}, behavior, settings, phase)
    metrics = {name: metric for name, metric in whole.metrics.items() if name not in plain.metrics}
    return EvaluationResult(metrics, whole.predictions[len(plain.predictions) :])


def mean_loss(
    model: nn.Module, tokenizer: Any, examples: Sequence[Example], settings: EvaluationSettings
) -> Measurement:
    """Nats per response token of `examples`."""
    return mean(sample_losses(module(model, tokenizer), {"examples": examples}, settings, ON_CPU)["examples"])
