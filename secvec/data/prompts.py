"""Prompts for `Trainer.predict`: in batches, kind by kind and longest first, shared out over the processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from secvec.data.encode import rendered, tokens
from secvec.data.example import Example
from secvec.errors import DataError
from secvec.runs.processes import rank_and_world

if TYPE_CHECKING:
    from secvec.module import SecVecModule

Prompts = Sequence[Sequence[int]]
"""Token ids of each prompt of a batch."""


class Answer(NamedTuple):
    """What a model has written."""

    text: str
    cut: bool
    """Whether it had not come to its end when it reached the limit of tokens."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts as texts, made from `examples`. Greedy; with a `seed`, sampled at temperature 1 instead."""

    texts: Sequence[str]
    examples: Sequence[Example]
    seed: int | None = None
    begun: str = ""
    """The beginning of every answer, which the model goes on from."""

    def ids(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], list[int]]]:
        """Token ids of each prompt, and of the beginning of its answer: those of a training row."""
        return tokens([(text, self.begun) for text in self.texts], tokenizer)

    def batches(
        self, module: SecVecModule, batch_size: int, max_new_tokens: int
    ) -> list[Callable[[SecVecModule], list[dict[str, Any]]]]:
        """The batches of this process, as functions of the module.

        All prompts decide what is in a batch, so that a kept batch is found again when the others are missing. An
        engine has one caller: then the first process has all batches. Raises DataError for a prompt that leaves no room
        to answer.
        """
        prompts = self.ids(module.backbone.tokenizer)
        lengths = [len(prompt) + len(begun) for prompt, begun in prompts]
        new = [example.max_new_tokens or max_new_tokens for example in self.examples]
        for example, length, most in zip(self.examples, lengths, new, strict=True):
            limit = module.backbone.context - most
            if length > limit:
                raise DataError(
                    f"{example.source or example.kind}: the prompt has {length} tokens; with "
                    f"max_new_tokens={most} at most {limit} fit into the model's context"
                )
        longest: dict[str, int] = {}
        for example, length in zip(self.examples, lengths, strict=True):
            longest[example.kind] = max(length, longest.get(example.kind, 0))

        def place(i: int) -> tuple[int, int, str, int]:
            kind = self.examples[i].kind  # its answers are about as long: a batch goes on until its last one ends
            return -new[i], -longest[kind], kind, -lengths[i]

        order = sorted(range(len(prompts)), key=place)
        rank, world = rank_and_world()
        callers = 1 if module.generation.engine else world
        mine = order[rank::callers] if rank < callers else []
        alike = [list(rows) for _, rows in groupby(mine, key=lambda i: new[i])]  # a batch has one limit
        chunks = [rows[start : start + batch_size] for rows in alike for start in range(0, len(rows), batch_size)]
        return [partial(self._answer, rows, [prompts[i] for i in rows], new[rows[0]]) for rows in chunks]

    def _answer(
        self,
        rows: Sequence[int],
        prompts: Sequence[tuple[list[int], list[int]]],
        max_new_tokens: int,
        module: SecVecModule,
    ) -> list[dict[str, Any]]:
        """One entry per prompt: its place in the set, kind, prompt, the model's answer, and the reference."""
        answers = module.generation.respond(module, prompts, max_new_tokens, self.seed)
        return [
            {"row": row, "kind": e.kind, "prompt": e.prompt, "response": text, "cut": cut, "reference": e.response}
            for row, e, (text, cut) in zip(rows, (self.examples[i] for i in rows), answers, strict=True)
        ]


def prompt_set(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> PromptSet:
    """The prompts of `examples` as the model's chat template writes them."""
    return PromptSet([prompt for prompt, _ in rendered(examples, tokenizer)], examples)


def loader(batches: Sequence[Any]) -> DataLoader:
    """A dataloader over batches that are made already. It draws nothing from the global random state."""
    return DataLoader(batches, batch_size=None, generator=torch.Generator())  # type: ignore[arg-type]
