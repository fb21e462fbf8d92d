"""Token counts of a run's samples: counted where the data are on this machine, else assumed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import fmean

from transformers import PreTrainedTokenizerBase

from secvec.config.schema import RunConfig
from secvec.data.datamodule import SecVecDataModule
from secvec.data.encode import encode
from secvec.data.example import Example
from secvec.data.hub import HubData
from secvec.data.jsonl import JsonlFiles
from secvec.errors import ConfigError
from secvec.stages.align import align_examples, tiny_texts, tiny_unaligned

PROMPT_TOKENS, RESPONSE_TOKENS = 128, 256
"""Assumed where the data are not on this machine."""
CHARACTERS_PER_TOKEN = 4
"""Assumed where the tokenizer is not."""

Examples = Mapping[str, Sequence[Example]]


@dataclass(frozen=True)
class Length:
    """Tokens of one kind of sample."""

    prompt: float  # mean
    response: float  # mean
    longest: int  # prompt and response
    longest_prompt: int

    @property
    def total(self) -> float:
        """Mean of prompt and response together."""
        return self.prompt + self.response


def is_local(config: RunConfig) -> bool:
    """Whether all data are on this machine."""
    sources = [s for s in (config.behavior, *config.data.streams) if isinstance(s, HubData | JsonlFiles)]
    return all(source.is_local for source in sources)


def checked_data(config: RunConfig) -> SecVecDataModule:
    """The data that the run would draw. Raises ConfigError and DataError as the run would."""
    data = SecVecDataModule.of(config)
    data.check(dict.fromkeys((*config.stages, "finetune")))
    return data


def samples_of(data: SecVecDataModule, stages: Sequence[str]) -> dict[str, list[Example]]:
    """The samples that `stages` draw, by kind."""
    undesired = [example for mixture in data.mixtures for example in mixture["undesired"]]
    benign = [example for mixture in data.mixtures for example in mixture["benign"]]
    if "vector" in stages:
        undesired += [*data.vector_samples["undesired"], *data.held_out]
        benign += data.vector_samples["kl"]
    return {"undesired": undesired, "benign": benign, "test": [e for examples in data.tests.values() for e in examples]}


def numbers_of(config: RunConfig, data: SecVecDataModule | None) -> dict[str, int]:
    """How many samples of each use there are: counted, or as the settings say where the data are not at hand."""
    vector, evaluation, (harmful, benign) = config.vector, config.evaluation, config.data.counts
    numbers = {"vector": vector.num_samples, "gate": vector.gate.num_prompts, "test": evaluation.num_prompts}
    numbers |= {"undesired": harmful, "benign": benign, "leak": evaluation.num_leak_prompts}
    if data:
        numbers |= {kind: len(examples) for kind, examples in data.mixtures[0].items()}
        numbers["test"] = len(data.tests["undesired"])
        if "vector" in config.stages:
            numbers |= {"vector": len(data.vector_samples["undesired"]), "gate": len(data.held_out)}
    if numbers["test"] is not None:
        numbers["leak"] = min(numbers["test"], numbers["test"] if numbers["leak"] is None else numbers["leak"])
    if unknown := [name for name, number in numbers.items() if number is None]:
        raise ConfigError(
            f"the plan must know how many samples there are, and the data are not on this machine: give numbers, not "
            f"null ({', '.join(unknown)})"
        )
    return {name: number for name, number in numbers.items() if number is not None}


def tiny_words(config: RunConfig) -> list[str]:
    """The texts for the tiny model's tokenizer."""
    align = config.model.align
    if align is None:
        raise tiny_unaligned()
    return tiny_texts(config, align, align_examples(config, align))


def measure(
    examples: Examples | None, tokenizer: PreTrainedTokenizerBase | None, context: int
) -> tuple[dict[str, Length], str]:
    """Tokens by kind, and a note that says how they were found. Raises DataError for a sample longer than `context`."""
    if examples is None:
        note = f"data are not at hand: {PROMPT_TOKENS} tokens of prompt and {RESPONSE_TOKENS} of response"
        assumed = Length(PROMPT_TOKENS, RESPONSE_TOKENS, PROMPT_TOKENS + RESPONSE_TOKENS, PROMPT_TOKENS)
        return dict.fromkeys(("undesired", "benign", "test"), assumed), note
    note = "tokens are those of the run's own samples"
    if tokenizer is None:
        note = f"the tokenizer is not at hand: {CHARACTERS_PER_TOKEN} characters of the run's own samples make a token"
    return {kind: _length(samples, tokenizer, context) for kind, samples in examples.items()}, note


def _length(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase | None, context: int) -> Length:
    if not examples:
        return Length(0, 0, 0, 0)
    if tokenizer is not None:
        rows = encode(examples, tokenizer, context)
        sizes = [(row.num_prompt, len(row.input_ids) - row.num_prompt) for row in rows]
    else:
        texts = [(sum(len(text) for _, text in e.messages), len(e.response)) for e in examples]
        sizes = [(ceil(p / CHARACTERS_PER_TOKEN), ceil(r / CHARACTERS_PER_TOKEN)) for p, r in texts]
    prompts, responses = zip(*sizes, strict=True)
    return Length(fmean(prompts), fmean(responses), max(map(sum, sizes)), max(prompts))
