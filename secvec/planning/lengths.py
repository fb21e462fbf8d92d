"""How long a run's samples are, in tokens: drawn and counted where they are at hand, assumed where they are not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from transformers import PreTrainedTokenizerBase

from secvec.config.load import RunConfig
from secvec.data.draw import check_disjoint
from secvec.data.encode import encode
from secvec.data.example import Example
from secvec.data.hub import HubData
from secvec.stages.align import align_examples, tiny_texts, tiny_unaligned
from secvec.stages.base import test_sets
from secvec.stages.finetune import mixtures
from secvec.stages.vector import vector_samples

PROMPT_TOKENS, RESPONSE_TOKENS = 128, 256
"""Of a sample whose data are not at hand."""
CHARACTERS_PER_TOKEN = 4
"""Where the tokenizer is not at hand."""

Examples = Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Length:
    """Tokens of a kind of sample: mean prompt and response, the longest sample and the longest prompt."""

    prompt: float
    response: float
    longest: int
    longest_prompt: int

    @property
    def whole(self) -> float:
        """Prompt and response."""
        return self.prompt + self.response


def at_hand(config: RunConfig) -> bool:
    """Whether no stream has to be fetched first."""
    streams = [s for s in (config.behavior, *config.data.benign) if isinstance(s, HubData)]
    return all(stream.local_path is not None and stream.local_path.exists() for stream in streams)


def drawn(config: RunConfig) -> dict[str, list[Example]]:
    """The samples that the run would draw, by kind; raises DataError as the run would."""
    cycles = mixtures(config)
    undesired = [example for samples in cycles for example in samples["undesired"]]
    others = [example for samples in cycles for example in samples["benign"]]
    if "vector" in config.stages:
        samples, kl = vector_samples(config)
        held_out = config.vector_behavior.examples("validation", config.vector.gate.num_prompts, config.seed)
        undesired += [*samples, *held_out]
        others += kl
    tests = [example for some in test_sets(config).values() for example in some]
    check_disjoint([*undesired, *others], tests)
    return {"undesired": undesired, "benign": others, "test": tests}


def tiny_words(config: RunConfig) -> list[str]:
    """What the tiny model's tokenizer is made of."""
    align = config.model.align
    if align is None:
        raise tiny_unaligned()
    return tiny_texts(config, align_examples(config, align), align.seed)


def measure(
    examples: Examples | None, tokenizer: PreTrainedTokenizerBase | None, context: int, notes: list[str]
) -> dict[str, Length]:
    """Tokens by kind: counted, or from characters, or assumed; raises DataError for a sample that does not fit."""
    if examples is None:
        notes.append(f"data are not at hand: {PROMPT_TOKENS} tokens of prompt and {RESPONSE_TOKENS} of response")
        assumed = Length(PROMPT_TOKENS, RESPONSE_TOKENS, PROMPT_TOKENS + RESPONSE_TOKENS, PROMPT_TOKENS)
        return dict.fromkeys(("undesired", "benign", "test"), assumed)
    notes.append(
        "tokens are those of the run's own samples" if tokenizer
        else f"the tokenizer is not at hand: {CHARACTERS_PER_TOKEN} characters of the run's own samples make a token"
    )  # fmt: skip
    return {kind: _length(_sizes(some, tokenizer, context)) for kind, some in examples.items()}


def _sizes(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase | None, context: int
) -> list[tuple[int, int]]:
    """(prompt, response) in tokens."""
    if tokenizer is not None:
        rows = encode(examples, tokenizer, context)
        return [(row.num_prompt, len(row.input_ids) - row.num_prompt) for row in rows]
    texts = [(sum(len(text) for _, text in e.messages), len(e.response)) for e in examples]
    return [(ceil(p / CHARACTERS_PER_TOKEN), ceil(r / CHARACTERS_PER_TOKEN)) for p, r in texts]


def _length(sizes: Sequence[tuple[int, int]]) -> Length:
    n = max(1, len(sizes))
    prompts, responses = [p for p, _ in sizes], [r for _, r in sizes]
    longest = max((p + r for p, r in sizes), default=0)
    return Length(sum(prompts) / n, sum(responses) / n, longest, max(prompts, default=0))
