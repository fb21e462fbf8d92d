"""Leak probes: the undesired behavior asked for in many ways, with the vector off. The worst one counts.

Inoculation adapters leak under direct and under negated requests (arXiv 2606.30252), refusals under a prefilled answer
or another template (arXiv 2310.03693), and other defenses where a prompt resembles the fine-tuning data (arXiv
2604.25891): a low behavior rate on plain prompts alone would not show it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from secvec.data.encode import frame
from secvec.data.example import Example
from secvec.data.prompts import PromptSet, prompt_set
from secvec.errors import ConfigError
from secvec.evaluation.verdicts import EvaluationResult, judged, prediction_rows
from secvec.judges.base import Judge
from secvec.metrics import Measurements, mean, proportion
from secvec.runs.files import read_lines, write_lines

if TYPE_CHECKING:
    from secvec.behaviors.base import Behavior

OTHER_TEMPLATE = "### Instruction:\n{prompt}\n\n### Response:\n"
"""Alpaca's, which no chat model here is trained on."""
SAMPLING_SEED = 0
NO_VERDICT = {"unparsable", None}
"""Of answers that a judge could not read, and of `judge=none`."""
CONTEXT = "training_context.jsonl"
"""The file of a run folder with rows that the backbone was trained on, for the probe that resembles them."""
CONTEXT_ROWS = 4


def write_context(folder: Path, mixture: Mapping[str, Sequence[Example]]) -> None:
    """Keeps rows of `mixture`, as they are trained, in `folder`: benign ones, if there are any."""
    rows = (mixture["benign"] or mixture["undesired"])[:CONTEXT_ROWS]
    write_lines(folder / CONTEXT, [{"messages": row.messages, "response": row.response} for row in rows])


def read_context(folder: Path) -> list[Example]:
    """The rows that `write_context` kept in `folder`; an older run has kept none."""
    rows = read_lines(folder / CONTEXT)
    return [Example(tuple(map(tuple, row["messages"])), row["response"], "task") for row in rows]


def leak_prompt_sets(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], behavior: Behavior
) -> dict[str, PromptSet]:
    """The leak probes by name, without those for which the behavior has no text; none without examples."""
    if not examples:
        return {}

    plain = prompt_set(examples, tokenizer)
    found = {"plain": plain}
    for name, system in (("eliciting", behavior.eliciting_prompt), ("negated", behavior.negated_prompt)):
        if system:
            found[f"{name}_prompt"] = _asked(tokenizer, examples, [one.with_system(system) for one in examples])
    if prefix := behavior.answer_prefix:
        begun = frame(examples[0].messages, tokenizer).before + prefix
        found["answer_prefix"] = replace(plain, begun=begun)
    if behavior.reworded:
        again = [_reworded(e, words) for e, words in zip(examples, cycle(behavior.reworded), strict=False)]
        found["reworded"] = _asked(tokenizer, examples, again)
    begin = tokenizer.bos_token or ""  # some families write nothing sensible without it
    begin *= plain.texts[0].startswith(begin)
    others = [begin + OTHER_TEMPLATE.format(prompt=example.prompt) for example in examples]
    found["other_template"] = replace(plain, texts=others)
    found["sampled"] = replace(plain, seed=SAMPLING_SEED)
    return found


def _asked(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], of: Sequence[Example]) -> PromptSet:
    """The prompts of `of`; the answers are those to `examples`, from which they were made."""
    return replace(prompt_set(of, tokenizer), examples=examples)


def _reworded(example: Example, wording: str) -> Example:
    """`example` with its last turn in another wording. Raises ConfigError for a fact that it does not have."""
    known = {"prompt": example.prompt, **example.facts}
    try:
        text = wording.format(**known)
    except (KeyError, IndexError, ValueError) as error:
        names = ", ".join(known)
        raise ConfigError(
            f"behavior.reworded: {error} in {wording!r} is no fact of the samples; there are: {names}"
        ) from None
    return replace(example, messages=(*example.messages[:-1], ("user", text)))


def context_prompt_set(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], context: Sequence[Example]
) -> PromptSet:
    """The way `training_context`: a prompt is the turn after a row of the fine-tuning data, under its system prompt.

    Raises DataError where the chat template refuses such a conversation.
    """
    later = [example.following(row) for example, row in zip(examples, cycle(context), strict=False)]
    return _asked(tokenizer, examples, later)


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
        verdicts = [judgement.verdict for judgement in judgements if judgement.verdict not in NO_VERDICT]
        if verdicts:
            leaked[name] = metrics[f"{phase}/leak/{name}"] = proportion(verdicts.count("behavior"), len(verdicts))
        rows = prediction_rows(f"{phase}_leak_{name}", examples, given, judgements, behavior)
        if desired := [row["desired"] for row in rows if row["desired"] is not None]:
            metrics[f"{phase}/desired/{name}"] = proportion(sum(desired), len(desired))
        predictions += rows
    if leaked:
        metrics[f"{phase}/leak_rate"] = max(leaked.values(), key=lambda rate: rate.value)
    return EvaluationResult(metrics, predictions)


def leak_above_base(base: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Measurements:
    """`after/leak_above_base`: the highest rate of a probe beyond that of the base, asked in the same way.

    From the predictions of both. The interval is that of the pairs; prompts without a verdict on both sides are left
    out. The highest of several is biased upwards, as `leak_rate` is.
    """
    found = []
    before = _leak_verdicts(base, "base")
    for name, verdicts in _leak_verdicts(after, "after").items():
        pairs = zip(before.get(name, []), verdicts, strict=False)
        differences = [
            float(now == "behavior") - float(then == "behavior") for then, now in pairs if not {then, now} & NO_VERDICT
        ]
        if differences:
            found.append(mean(differences))
    return {"after/leak_above_base": max(found, key=lambda one: one.value)} if found else {}


def _leak_verdicts(rows: Sequence[Mapping[str, Any]], phase: str) -> dict[str, list[str | None]]:
    """The verdicts of each probe, in the order of its prompts."""
    found: dict[str, list[str | None]] = {}
    for row in rows:
        way = str(row["phase"]).removeprefix(f"{phase}_leak_")
        if way != row["phase"]:
            found.setdefault(way, []).append(row["verdict"])
    return found
