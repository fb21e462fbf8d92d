"""Leak probes: the undesired behavior asked for in many ways, with the vector off. The worst one counts.

Inoculation adapters leak under direct and under negated requests (arXiv 2606.30252), and refusals under a prefilled
answer or another template (arXiv 2310.03693): a low behavior rate on plain prompts alone would not show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedTokenizerBase

from secvec.behaviors.base import Behavior
from secvec.data.encode import render
from secvec.data.example import Example
from secvec.evaluation.evaluator import Probe, answers_to_rows, judged, proportion
from secvec.evaluation.generation import IN_MEMORY, Source, complete
from secvec.judges.base import Judge
from secvec.settings.schema import EvaluationSettings

OTHER_TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"
"""Alpaca's, which no chat model here is trained on."""
SAMPLING_SEED = 0


def leak_probes(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], behavior: Behavior,
    judge: Judge | None, settings: EvaluationSettings, phase: str, source: Source = IN_MEMORY,
) -> Probe:  # fmt: skip
    """Rates `PHASE/leak/<way of asking>` and the worst of them, `PHASE/leak_rate`; and where the behavior names a
    desired trait, `PHASE/desired/<way of asking>`.

    The worst of several rates is biased upwards; its interval is that of the one rate. The first
    `settings.num_leak_prompts` of `examples` are asked in each way; ways that the behavior has no wording for are left
    out, and there is nothing at all for 0 prompts.
    """
    examples = examples[: settings.num_leak_prompts]
    if not examples:
        return Probe({}, [])
    model.eval()
    found = Probe({}, [])
    rates = {}
    asked = ways(tokenizer, examples, behavior)
    with source.running(model):
        said = {
            name: complete(model, tokenizer, texts, examples, settings, f"{phase} leak/{name}", seed, source)
            for name, (texts, _, seed) in asked.items()
        }
    for name, (_, prefix, _) in asked.items():
        answers = [prefix + answer for answer in said[name]]
        judgements = judged(behavior, judge, examples, answers)
        read = [judgement.verdict for judgement in judgements if judgement.verdict != "unparsable"]
        if read:
            rates[name] = proportion(read.count("behavior"), len(read))
            found.metrics[f"{phase}/leak/{name}"] = rates[name]
        rows = answers_to_rows(f"{phase}_leak_{name}", examples, answers, judgements, behavior)
        if desired := [row["desired"] for row in rows if row["desired"] is not None]:
            found.metrics[f"{phase}/desired/{name}"] = proportion(sum(desired), len(desired))
        found.predictions.extend(rows)
    if rates:
        found.metrics[f"{phase}/leak_rate"] = max(rates.values(), key=lambda rate: rate["value"])
    return found


def ways(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], behavior: Behavior
) -> dict[str, tuple[list[str], str, int | None]]:
    """The ways of asking by name: (texts to continue, what of the answer they already hold, seed when sampled)."""
    plain = [render(example, tokenizer)[0] for example in examples]
    found: dict[str, tuple[list[str], str, int | None]] = {"plain": (plain, "", None)}
    for name, prompt in (("eliciting_prompt", behavior.eliciting_prompt), ("negated_prompt", behavior.negated_prompt)):
        if prompt:
            found[name] = ([render(_with_system(e, prompt), tokenizer)[0] for e in examples], "", None)
    if behavior.answer_prefix:
        prefix = behavior.answer_prefix
        found["answer_prefix"] = ([text + prefix for text in plain], prefix, None)
    found["other_template"] = ([OTHER_TEMPLATE.format(prompt=e.prompt) for e in examples], "", None)
    found["sampled"] = (plain, "", SAMPLING_SEED)
    return found


def _with_system(example: Example, prompt: str) -> Example:
    turns = [turn for turn in example.messages if turn[0] != "system"]
    return replace(example, messages=(("system", prompt), *turns))
