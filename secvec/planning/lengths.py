"""Token counts of a run's samples: counted where the data are on this machine, else assumed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from secvec.data.datamodule import SecVecDataModule
from secvec.data.encode import encode
from secvec.data.example import Example
from secvec.errors import ConfigError

PROMPT_TOKENS, RESPONSE_TOKENS = 128, 256
"""Assumed where the data are not on this machine."""
CHARACTERS_PER_TOKEN = 4
"""Assumed where the tokenizer is not."""

Examples = Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Length:
    """Tokens of one kind of sample: of the prompt and the response of each."""

    sizes: Sequence[tuple[int, int]]

    @property
    def prompt(self) -> float:
        """The mean."""
        return fmean(prompt for prompt, _ in self.sizes) if self.sizes else 0

    @property
    def response(self) -> float:
        """The mean."""
        return fmean(response for _, response in self.sizes) if self.sizes else 0

    @property
    def longest(self) -> int:
        """Prompt and response together."""
        return max(map(sum, self.sizes), default=0)

    @property
    def longest_prompt(self) -> int:
        """Without its response."""
        return max((prompt for prompt, _ in self.sizes), default=0)


def samples_of(data: SecVecDataModule, stages: Sequence[str]) -> dict[str, list[Example]]:
    """The samples that `stages` draw, by kind."""
    drawn = {kind: [e for mixture in data.mixtures for e in mixture[kind]] for kind in ("undesired", "benign")}
    drawn["test"] = [e for examples in data.tests.values() for e in examples]
    if "vector" in stages:
        drawn |= {"vector": data.vector_samples["undesired"], "kl": data.vector_samples["kl"], "gate": data.held_out}
    return drawn


def numbers_of(data: SecVecDataModule, stages: Sequence[str]) -> dict[str, int]:
    """The number of samples of each use: counted, or by the settings where the data are not on this machine."""
    vector, evaluation, (harmful, benign) = data.vector, data.evaluation, data.data.counts
    numbers = {"undesired": harmful, "benign": benign, "test": evaluation.num_prompts}
    numbers |= {"leak": evaluation.num_leak_prompts}
    if "vector" in stages:
        numbers |= {"vector": vector.num_samples, "gate": vector.gate.num_prompts}
    if data.is_local:
        numbers |= {kind: len(examples) for kind, examples in data.mixtures[0].items()}
        numbers["test"] = len(data.tests["undesired"])
        if "vector" in stages:
            numbers |= {"vector": len(data.vector_samples["undesired"]), "gate": len(data.held_out)}
    if numbers["test"] is not None:
        numbers["leak"] = min(numbers["test"], numbers["test"] if numbers["leak"] is None else numbers["leak"])
    if unknown := [name for name, number in numbers.items() if number is None]:
        raise ConfigError(
            f"the plan must know how many samples there are, and the data are not on this machine: give numbers, not "
            f"null ({', '.join(unknown)})"
        )
    return {name: number for name, number in numbers.items() if number is not None}


def measure(
    examples: Examples | None, tokenizer: PreTrainedTokenizerBase | None, context: int
) -> tuple[dict[str, Length], str]:
    """Tokens by kind, and a note that says how they were found. Raises DataError for a sample longer than `context`."""
    if examples is None:
        note = f"the data are not on this machine: {PROMPT_TOKENS} tokens of prompt and {RESPONSE_TOKENS} of response"
        kinds = ("undesired", "benign", "test", "vector", "kl", "gate")
        return dict.fromkeys(kinds, Length([(PROMPT_TOKENS, RESPONSE_TOKENS)])), note
    note = "tokens are those of the run's own samples"
    if tokenizer is None:
        note = f"the tokenizer is not on this machine: {CHARACTERS_PER_TOKEN} characters of the samples make a token"
    return {kind: _length(samples, tokenizer, context) for kind, samples in examples.items()}, note


def _length(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase | None, context: int) -> Length:
    if tokenizer is not None and examples:
        rows = encode(examples, tokenizer, context)
        return Length([(row.num_prompt, len(row.input_ids) - row.num_prompt) for row in rows])
    texts = [(sum(len(text) for _, text in e.messages), len(e.response)) for e in examples]
    return Length([(ceil(p / CHARACTERS_PER_TOKEN), ceil(r / CHARACTERS_PER_TOKEN)) for p, r in texts])
