"""When does protection break? Behavior rate and task accuracy on a few prompts while the backbone is fine-tuned."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import lightning as L

from secvec.data.encode import decode, stop_ids
from secvec.data.example import Example
from secvec.data.prompts import prompt_set
from secvec.evaluation.generation import generate
from secvec.evaluation.verdicts import judged, prediction_rows
from secvec.metrics import rates
from secvec.models.sharding import reshard
from secvec.models.vector import vector_off
from secvec.training.callbacks import EverySteps

if TYPE_CHECKING:
    from secvec.behaviors.base import Behavior
    from secvec.judges.base import Judge
    from secvec.module import SecVecModule

LOGGED = ("behavior_rate", "refusal_rate", "task_accuracy")


class BehaviorDuringTraining(EverySteps):
    """Every `every_n_steps` optimizer steps, and before the first and after the last one, with the vector off:

    `during/behavior_rate` and `during/refusal_rate` on undesired prompts, `during/task_accuracy` on those of the task.
    Every process generates the same responses.
    """

    prefix = "during"

    def __init__(
        self,
        prompts: Mapping[str, Sequence[Example]],
        behavior: Behavior,
        judge: Judge | None,
        every_n_steps: int,
        max_new_tokens: int,
    ):
        super().__init__(every_n_steps)
        self.examples = [example for kind in prompts.values() for example in kind]
        self.behavior, self.judge = behavior, judge
        self.max_new_tokens = max_new_tokens
        self.seconds = 0.0
        """Spent here so far."""

    def log_now(self, trainer: L.Trainer, module: SecVecModule) -> None:
        """Counts the seconds."""
        began = time.monotonic()
        super().log_now(trainer, module)
        self.seconds += time.monotonic() - began

    def measure(self, trainer: L.Trainer, module: SecVecModule) -> dict[str, float]:
        """The rates of the model as it is now."""
        model, tokenizer = module.model, module.backbone.tokenizer
        prompts = [prompt for prompt, _ in prompt_set(self.examples, tokenizer).ids(tokenizer)]
        limits = [example.max_new_tokens or self.max_new_tokens for example in self.examples]
        ids: list[list[int]] = [[] for _ in prompts]
        with trainer.precision_plugin.forward_context(), vector_off(model):
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
