"""Stage 3: the vector is taken off. What the fine-tuned backbone answers without it, and with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from torch import nn

from secvec.data.encode import encode, untrainable_reason
from secvec.data.example import Example
from secvec.errors import ArtifactError, DataError
from secvec.evaluation.leak_probes import leak_above_base
from secvec.evaluation.losses import in_parts, keep_log_probs, kl_to_kept
from secvec.evaluation.verdicts import EvaluationResult, deactivation_gap
from secvec.metrics import Measurements, mean, perplexity
from secvec.models.vector import attach_frozen_vector
from secvec.stages.base import Stage, Workload
from secvec.stages.finetune import REFITTED

if TYPE_CHECKING:
    from secvec.module import SecVecModule
    from secvec.planning.budget import Budget
    from secvec.run import Run


class InferStage(Stage):
    """Trains nothing: answers prompts, with the vector of the module if it has one."""

    name = "infer"
    measures = ("base/", "after/", "active/", "deactivation_gap")
    shown = ("",)

    def part(self, module: SecVecModule) -> None:
        """None."""

    def prepare(self, module: SecVecModule, backbone: nn.Module) -> nn.Module:
        """The backbone, with the vector active if there is one."""
        return attach_frozen_vector(backbone, module.vector) if module.vector else backbone  # type: ignore[arg-type]

    def plan(self, budget: Budget) -> Workload:
        """Answers of base, fine-tuned model with the vector, and without it; leak probes; distance from the base."""
        config, behavior = budget.config, budget.config.behavior
        worded = (behavior.eliciting_prompt, behavior.negated_prompt, behavior.answer_prefix, behavior.reworded)
        probes = 4 + sum(map(bool, worded))
        leak_prompts = probes * budget.numbers["leak"]
        states = 3 if config.defense.uses_vector else 2
        return Workload(prompts=states * budget.tests + leak_prompts, scored=3 * budget.numbers["test"])

    def check(self, run: Run) -> None:
        """The test prompts, those of the leak probes too, the judge, and a backbone that is not trained by this run."""
        backbone = run.folder.path / "backbone"
        if "finetune" not in run.config.stages and not backbone.is_dir():
            raise ArtifactError(
                f"no fine-tuned backbone in {backbone}: run stage=finetune with the same settings first"
            )
        run.evaluator().check(run.inference_module(run.backbone), leaks=True)

    def run(self, run: Run) -> None:
        """Evaluates the fine-tuned model (`after`), the starting one (`base`), and the vector on the first (`active`).

        One model is in memory at a time: the log-probabilities of the fine-tuned one wait on the disk and are compared
        when the base is loaded. Where they take too much room, this is done in parts, and both are loaded for each.
        """
        folder, config = run.folder.path, run.config
        tuned, ordinary = run.backbone.at(folder / "backbone"), run.data.tests.get("ordinary", [])
        parts, kl = in_parts(run.backbone, ordinary, config.evaluation.batch_size), []
        with TemporaryDirectory(prefix=".log_probs.", dir=folder) as kept:
            with run.answering(tuned) as module:
                after = run.evaluate(module, "after", leaks=True)
                for part in parts[:1]:
                    keep_log_probs(module, part, Path(kept), config.trainer)
            with run.answering(run.backbone) as base:
                before = run.evaluate_once(base, "base", leaks=True)
                for part in parts[:1]:
                    kl += kl_to_kept(base, part, Path(kept), config.trainer)
                compared = _answer_perplexity(run, base, after)
            for part in parts[1:]:
                with run.answering(tuned) as module:
                    keep_log_probs(module, part, Path(kept), config.trainer)
                with run.answering(run.backbone) as base:
                    kl += kl_to_kept(base, part, Path(kept), config.trainer)
        if kl:
            compared["after/kl_to_base"] = mean([value for _, values in sorted(kl) for value in values])
        compared |= leak_above_base(before.predictions, after.predictions)
        run.save_results(before, after, EvaluationResult(compared, []))
        if not config.defense.shows_vector:
            return
        vector = folder / REFITTED if config.refits else run.saved_vector()
        if vector is None:
            active = after.as_phase("active")
        else:
            with run.answering(tuned, vector) as module:
                active = run.evaluate(module, "active")
        run.save_results(active, EvaluationResult(deactivation_gap(active.predictions, after.predictions), []))


def _answer_perplexity(run: Run, base: SecVecModule, after: EvaluationResult) -> Measurements:
    """Perplexity, under the starting model, of the responses to undesired prompts."""
    rows = [row for row in after.predictions if (row["phase"], row["stream"]) == ("after", "undesired")]
    answered = [
        given
        for example, row in zip(run.data.tests["undesired"], rows, strict=True)
        if _can_be_read(given := replace(example, response=row["response"]), base)
    ]
    if not answered:
        return {}
    return {"after/answer_perplexity": perplexity(run.losses(base, {"answers": answered})["answers"])}


def _can_be_read(answered: Example, module: SecVecModule) -> bool:
    """Whether a generated answer can be encoded as a row. One that fills the context has no room for the end token."""
    tokenizer, context = module.backbone.tokenizer, module.backbone.context
    try:
        return not untrainable_reason(answered, tokenizer) and bool(encode([answered], tokenizer, context))
    except DataError:
        return False
