"""Leak probes: the undesired behavior asked for in many ways, with the vector off. The worst one counts.

Inoculation adapters leak under direct and under negated requests (arXiv 2606.30252), and refusals under a prefilled
answer or another template (arXiv 2310.03693): a low behavior rate on plain prompts alone would not show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from secvec.data.encode import frame, render
from secvec.data.example import Example
from secvec.data.prompts import Question
from secvec.evaluation.verdicts import EvaluationResult, judged, prediction_rows
from secvec.judges.base import Judge
from secvec.metrics import Measurements, proportion

if TYPE_CHECKING:
    from secvec.behaviors.base import Behavior

OTHER_TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"
"""Alpaca's, which no chat model here is trained on."""
SAMPLING_SEED = 0


def leak_questions(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], behavior: Behavior
) -> dict[str, Question]:
    """The ways of asking by name.

    Ways that the behavior has no wording for are left out. Without examples there are none.
    """
    if not examples:
        return {}

    def asked(system: str) -> list[str]:
        return [render(example.with_system(system), tokenizer)[0] for example in examples]

    plain = [render(example, tokenizer)[0] for example in examples]
    found = {"plain": Question(plain, examples)}
    if behavior.eliciting_prompt:
        found["eliciting_prompt"] = Question(asked(behavior.eliciting_prompt), examples)
    if behavior.negated_prompt:
        found["negated_prompt"] = Question(asked(behavior.negated_prompt), examples)
    if prefix := behavior.answer_prefix:
        begun = frame(examples[0].messages, tokenizer).before + prefix
        found["answer_prefix"] = Question(plain, examples, begun=begun)
    begin = tokenizer.bos_token or ""  # some families write nothing sensible without it
    begin *= plain[0].startswith(begin)
    others = [begin + OTHER_TEMPLATE.format(prompt=example.prompt) for example in examples]
    found["other_template"] = Question(others, examples)
    found["sampled"] = Question(plain, examples, SAMPLING_SEED)
    return found


def leak_result(
    responses: Mapping[str, Sequence[str]],
    examples: Sequence[Example],
    behavior: Behavior,
    judge: Judge | None,
    phase: str,
) -> EvaluationResult:
    """Rates `PHASE/leak/<way of asking>` and the worst of them, `PHASE/leak_rate`.

    Where the behavior names a desired trait, `PHASE/desired/<way of asking>` too. The worst of several rates is biased
    upwards; its interval is that of the one rate.
    """
    metrics: Measurements = {}
    predictions = []
    leaked = {}
    for name, given in responses.items():
        judgements = judged(behavior, judge, examples, given)
        verdicts = [judgement.verdict for judgement in judgements if judgement.verdict != "unparsable"]
        if verdicts:
            leaked[name] = metrics[f"{phase}/leak/{name}"] = proportion(verdicts.count("behavior"), len(verdicts))
        rows = prediction_rows(f"{phase}_leak_{name}", examples, given, judgements, behavior)
        if desired := [row["desired"] for row in rows if row["desired"] is not None]:
            metrics[f"{phase}/desired/{name}"] = proportion(sum(desired), len(desired))
        predictions += rows
    if leaked:
        metrics[f"{phase}/leak_rate"] = max(leaked.values(), key=lambda rate: rate.value)
    return EvaluationResult(metrics, predictions)
