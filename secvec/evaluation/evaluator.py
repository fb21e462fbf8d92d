"""Evaluation of a model in one state: responses and losses by `trainer.predict`, then verdicts and rates."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from transformers import PreTrainedTokenizerBase

from secvec.data.encode import check_answers, rendered, tokens
from secvec.data.example import GRADED, OWNER, UNSCORED, Example
from secvec.data.prompts import PromptSet, prompt_set
from secvec.errors import DataError
from secvec.evaluation.leak_probes import context_prompt_set, leak_prompt_sets, leak_result
from secvec.evaluation.losses import sample_losses
from secvec.evaluation.prediction import respond
from secvec.evaluation.verdicts import JUDGED, EvaluationResult, is_right, judged, prediction_rows
from secvec.judges.base import Judge
from secvec.metrics import GRADED_METRICS, METRICS, Measurements, bootstrap_mean, mean, perplexity, rates
from secvec.settings.schema import EvaluationSettings
from secvec.settings.trainer import TrainerSettings

if TYPE_CHECKING:
    from secvec.behaviors.base import Behavior
    from secvec.module import SecVecModule

log = logging.getLogger(__name__)

T = TypeVar("T")
LOSSES = {"undesired": "behavior_loss", "task": "task_loss"}


@dataclass(frozen=True)
class Evaluator:
    """Held-out examples by kind, who judges the responses to them, and where the model runs."""

    tests: Mapping[str, Sequence[Example]]
    behavior: Behavior
    judge: Judge | None
    """None: the behavior's own judge."""
    settings: EvaluationSettings
    trainer: TrainerSettings
    answer_judge: Judge | None = None
    """Grades the answers of streams with `metric: judge`."""
    context: Sequence[Example] = ()
    """Rows of the fine-tuning data, for the leak probe that resembles them."""

    def evaluate(self, module: SecVecModule, phase: str, leaks: bool = False) -> EvaluationResult:
        """Responses, verdicts and losses of `module`; metric names begin with `phase`/. With `leaks`, leak probes too.

        Every process must call it: the prompts are shared out over all, and all get the whole result.
        """
        examples, probed, probes = self._asked(module, leaks)
        prompts = [prompt_set(examples, module.backbone.tokenizer), *probes.values()]
        responses, *to_probes = respond(module, prompts, self.settings, self.trainer, phase)
        result = self._result(module, phase, examples, responses)
        return result + leak_result(dict(zip(probes, to_probes, strict=True)), probed, self.behavior, self.judge, phase)

    def check(self, module: SecVecModule, leaks: bool = False) -> None:
        """Raises the SecVecError that would stop `evaluate`; needs no model.

        Prompts that leave no room to answer, right answers that would not count as right, a judge that cannot work.
        """
        examples, _, probes = self._asked(module, leaks)
        tokenizer, most = module.backbone.tokenizer, self.settings.max_new_tokens
        benign = [e for kind, some in self.tests.items() if kind not in JUDGED for e in some]
        check_answers([e for e in benign if e.metric not in GRADED], tokenizer, most, is_right)
        self._check_graded([e for e in benign if e.metric in GRADED and e.metric not in UNSCORED], tokenizer)
        if (compared := self.judge) and compared.compares:
            shown = self.tests.get("undesired", [])
            check_answers(shown, tokenizer, most, lambda text, e: compared.judge_one(e, text).verdict == "behavior")
        for asked in (prompt_set(examples, tokenizer), *probes.values()):
            asked.batches(module, self.settings.batch_size, most)
        for judge in (self.judge, self.answer_judge):
            if judge:
                judge.check()

    def _check_graded(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises DataError for a reference that would not get the full score of its own metric; tells of those cut."""
        for example in examples:
            if not is_right(example.response, example):
                raise DataError(
                    f"{example.source or example.kind}: metric: {example.metric} sees nothing in the reference "
                    f"{example.response[:80]!r} (rougeL reads words and numbers alone): use metric: judge or none"
                )
        whole = [replace(example, max_new_tokens=None) for example in examples]
        check_answers(whole, tokenizer, sys.maxsize, is_right)
        lengths = [len(answer) for _, answer in tokens(rendered(examples, tokenizer), tokenizer)]
        limits = [example.max_new_tokens or self.settings.max_new_tokens for example in examples]
        if cut := sum(length > limit for length, limit in zip(lengths, limits, strict=True)):
            log.warning(
                "%d of %d references are longer than max_new_tokens (up to %d tokens): their best score is below 1",
                *(cut, len(lengths), max(lengths)),
            )

    def _asked(self, module: SecVecModule, leaks: bool) -> tuple[list[Example], list[Example], dict[str, PromptSet]]:
        """The held-out examples, those that the leak probes ask for, and the prompts of the probes."""
        probed = list(self.tests.get("undesired", []))[: self.settings.num_leak_prompts] if leaks else []
        examples = [example for kind in self.tests.values() for example in kind]
        tokenizer = module.backbone.tokenizer
        probes = leak_prompt_sets(tokenizer, probed, self.behavior)
        if probed and self.context:
            try:
                way = context_prompt_set(tokenizer, probed, self.context)
                way.batches(module, self.settings.batch_size, self.settings.max_new_tokens)
                probes["training_context"] = way
            except DataError as error:
                log.warning("the leak probe training_context is left out: %s", error)
        return examples, probed, probes

    def _result(
        self, module: SecVecModule, phase: str, examples: Sequence[Example], responses: Sequence[str]
    ) -> EvaluationResult:
        judgements = judged(self.behavior, self.judge, examples, responses, self.answer_judge)
        rows = prediction_rows(phase, examples, responses, judgements, self.behavior)
        metrics: Measurements = {}
        for whose, of in _with_owners(examples, rows).items():
            graded = {name: METRICS[name].outcomes(of) for name in GRADED_METRICS}
            if self.judge is None or whose:
                del graded["behavior_score"]
            elif self.judge.scale != (0.0, 1.0):
                low, high = self.judge.scale
                graded["harmfulness_score"] = [low + (high - low) * score for score in graded["behavior_score"]]
            found = rates(of) | {name: bootstrap_mean(scores) for name, scores in graded.items() if scores}
            metrics |= {f"{phase}/{whose}{name}": value for name, value in found.items()}
        kinds = [kind for kind in ("undesired", "task", "ordinary") if self.tests.get(kind)]
        losses = sample_losses(module, {kind: self.tests[kind] for kind in kinds}, self.settings, self.trainer)
        for kind, every in losses.items():
            for whose, some in _with_owners(self.tests[kind], every).items():
                loss = mean(some)
                name, value = ("perplexity", perplexity(loss)) if kind == "ordinary" else (LOSSES[kind], loss)
                metrics[f"{phase}/{whose}{name}"] = value
        return EvaluationResult(metrics, rows)


def _with_owners(examples: Sequence[Example], values: Sequence[T]) -> dict[str, list[T]]:
    """All values (""), and under `of/NAME/` those of the examples of each behavior or stream, where it has several."""
    found = {"": list(values)}
    for example, value in zip(examples, values, strict=True):
        if owner := example.facts.get(OWNER):
            found.setdefault(f"of/{owner.replace('/', '_')}/", []).append(value)
    return found
