"""Answers of a model: batched, longest prompts first, shared out over the processes; greedy unless asked otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from secvec.data.encode import render
from secvec.data.example import Example
from secvec.errors import DataError
from secvec.evaluation.answer_cache import KeptAnswers
from secvec.runs.keys import content_key
from secvec.settings.schema import EvaluationSettings

Prompts = Sequence[Sequence[int]]
"""Token ids of each prompt of a batch."""


class Engine(Protocol):
    """Writes answers in the place of the model in memory; one process asks it, for all."""

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, it answers as `model` would, which waits in main memory; afterwards the GPU is free again."""

    def answer(self, prompts: Prompts, max_new_tokens: int, seed: int | None) -> list[list[int]]:
        """New token ids for each prompt; greedy, or with a `seed` sampled at temperature 1."""


@dataclass(frozen=True)
class Source:
    """What writes the answers, and where they are kept until all are there: by default the model in memory, nowhere."""

    identity: Sequence[Any] = ()
    """All that tells answers of this model and its engine from others; JSON-able."""
    folder: Path | None = None
    """Each process keeps its finished batches in a file here."""
    engine: Engine | None = None

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """Around every question to `model`."""
        return self.engine.running(model) if self.engine else nullcontext()


IN_MEMORY = Source()


def context_of(config: Any) -> int:
    """The most tokens that a model of this (Hugging Face) config takes."""
    return int(getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 2048))


def generate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example],
    settings: EvaluationSettings, phase: str, source: Source = IN_MEMORY,
) -> list[str]:  # fmt: skip
    """Greedy answers to `examples`, in their order. Raises DataError for a prompt that leaves no room to answer."""
    texts = [render(e, tokenizer)[0] for e in examples]
    return complete(model, tokenizer, texts, examples, settings, phase, source=source)


@torch.no_grad()
def complete(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], examples: Sequence[Example],
    settings: EvaluationSettings, phase: str, seed: int | None = None, source: Source = IN_MEMORY,
) -> list[str]:  # fmt: skip
    """What the model writes after each of `texts`, which were made from `examples`.

    Greedy; with a `seed`, sampled at temperature 1 instead. Every process must call it and gets all answers. Batches
    that `source` has kept are not asked again; all prompts decide what is in a batch, so the others are as they were.
    """
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    limit = context_of(model.config) - settings.max_new_tokens
    for example, prompt in zip(examples, prompts, strict=True):
        if len(prompt) > limit:
            raise DataError(
                f"{example.source or example.kind}: the prompt has {len(prompt)} tokens; with "
                f"evaluation.max_new_tokens={settings.max_new_tokens} at most {limit} fit into the model's context"
            )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    write, writers = (source.engine.answer, 1) if source.engine else (partial(_answer, model, tokenizer), world)
    mine = order[rank::writers] if rank < writers else []
    kept = KeptAnswers(source.folder and source.folder / f"{rank}.jsonl")
    answers: dict[int, str] = {}
    progress = tqdm(total=len(mine), desc=f"ask {phase}", unit="prompt", mininterval=0.5, disable=rank > 0, leave=False)
    for start in range(0, len(mine), settings.batch_size):
        chunk = mine[start : start + settings.batch_size]
        batch = [prompts[i] for i in chunk]
        key = content_key([source.identity, batch, settings.max_new_tokens, seed])
        said = kept.get(key)
        if said is None:
            ids = write(batch, settings.max_new_tokens, seed)
            said = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
            kept.add(key, said)
        answers.update(zip(chunk, said, strict=True))
        progress.update(len(chunk))
    progress.close()
    if world > 1:
        parts: list[dict[int, str]] = [{}] * world
        dist.all_gather_object(parts, answers)
        answers = {i: text for part in parts for i, text in part.items()}
    return [answers[i] for i in range(len(prompts))]


def _answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Prompts, max_new_tokens: int, seed: int | None
) -> list[list[int]]:
    """One left-padded batch."""
    length, device, pad = max(map(len, prompts)), next(model.parameters()).device, tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (length - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if seed is not None:
        sampling = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **sampling
        )
    new: list[list[int]] = out[:, length:].tolist()
    return new
