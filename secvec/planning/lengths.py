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
    streams = [s for s in (config.behavior, *config.data.streams) if isinstance(s, HubData)]
    return all(stream.local_path is not None and stream.local_path.exists() for stream in streams)


def draw_samples(config: RunConfig) -> dict[str, list[Example]]:
    """The samples that the run would draw, by kind; raises DataError as the run would."""
    data = SecVecDataModule.of(config)
    undesired = [example for mixture in data.mixtures for example in mixture["undesired"]]
    benign = [example for mixture in data.mixtures for example in mixture["benign"]]
    if "vector" in config.stages:
        undesired += [*data.vector_samples["undesired"], *data.held_out]
        benign += data.vector_samples["kl"]
    data.check_disjoint([*undesired, *benign])
    tests = [example for examples in data.tests.values() for example in examples]
    return {"undesired": undesired, "benign": benign, "test": tests}


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
