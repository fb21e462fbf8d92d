"""When does protection break? Behavior rate and task accuracy on a few prompts while the backbone is fine-tuned."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
import torch

from secvec.data.encode import decode, stop_ids
from secvec.data.example import Example
from secvec.data.prompts import question
from secvec.evaluation.generation import generate
from secvec.evaluation.verdicts import judged, prediction_rows
from secvec.metrics import rates
from secvec.models.modes import in_eval
from secvec.models.sharding import reshard
from secvec.models.vector import vector_off

if TYPE_CHECKING:
    from secvec.behaviors.base import Behavior
    from secvec.judges.base import Judge
    from secvec.module import SecVecModule

LOGGED = ("behavior_rate", "refusal_rate", "task_accuracy")


class BehaviorDuringTraining(L.Callback):
    """Every `every_n_steps` optimizer steps, and before the first and after the last one, with the vector off:

    `during/behavior_rate` and `during/refusal_rate` on undesired prompts, `during/task_accuracy` on those of the task.
    Weights, flags, gradients, mode and random state stay as they were. Every process generates the same responses.
    """

    def __init__(
        self,
        prompts: Mapping[str, Sequence[Example]],
        behavior: Behavior,
        judge: Judge | None,
        every_n_steps: int,
        max_new_tokens: int,
    ):
        self.examples = [example for kind in prompts.values() for example in kind]
        self.behavior, self.judge = behavior, judge
        self.every_n_steps, self.max_new_tokens = every_n_steps, max_new_tokens
        self.seconds = 0.0
        """Spent here so far."""
        self._done = -1

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        """The curve begins before the first step."""
        self._log(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After an optimizer step, when the gradients have been used."""
        if trainer.global_step % self.every_n_steps == 0:
            self._log(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
        """The curve ends after the last step."""
        self._log(trainer, module)

    def _log(self, trainer: L.Trainer, module: SecVecModule) -> None:
        if trainer.global_step == self._done:
            return
        self._done, began = trainer.global_step, time.monotonic()
        values = {f"during/{name}": value for name, value in self.measure(trainer, module).items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self.seconds += time.monotonic() - began

    def measure(self, trainer: L.Trainer, module: SecVecModule) -> dict[str, float]:
        """The rates of the model as it is now."""
        model, tokenizer = module.model, module.backbone.tokenizer
        prompts = [prompt for prompt, _ in question(self.examples, tokenizer).ids(tokenizer)]
        limits = [example.max_new_tokens or self.max_new_tokens for example in self.examples]
        ids: list[list[int]] = [[] for _ in prompts]
        devices = [module.device] if module.device.type == "cuda" else []
        autocast = trainer.precision_plugin.forward_context()
        with torch.random.fork_rng(devices=devices), autocast, vector_off(model), in_eval(model):
            for limit in sorted(set(limits)):
                rows = [row for row, own in enumerate(limits) if own == limit]
                given = generate(model, [prompts[row] for row in rows], limit, stop_ids(tokenizer))
                for row, response in zip(rows, given, strict=True):
                    ids[row] = response
        reshard(model)
        responses = decode(ids, tokenizer)
        judgements = judged(self.behavior, self.judge, self.examples, responses)
        found = rates(prediction_rows("during", self.examples, responses, judgements, self.behavior))
        return {name: found[name].value for name in LOGGED if name in found}
