"""What generates responses: the model in memory or an engine, with finished batches kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from transformers import GenerationConfig

from secvec.data.batch import PAD
from secvec.data.encode import decode, stop_ids
from secvec.data.prompts import Answer, Prompts
from secvec.evaluation.answer_cache import KeptAnswers
from secvec.runs.keys import content_key

if TYPE_CHECKING:
    from secvec.module import SecVecModule


class Engine(Protocol):
    """Generates in place of the model in memory, for example vLLM. One process calls it for all."""

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, the engine answers as `model` would, which waits in main memory; afterwards the GPU is free again."""

    def answer(self, prompts: Prompts, max_new_tokens: int, stop: Sequence[int], seed: int | None) -> list[list[int]]:
        """New token ids for each prompt up to one in `stop`; greedy, or with a `seed` sampled at temperature 1."""


@dataclass(frozen=True)
class GenerationBackend:
    """What generates, and where finished batches are kept, so that an interrupted evaluation goes on.

    The default is the model in memory, and nothing is kept.
    """

    identity: Sequence[Any] = ()
    """What distinguishes the responses of this model and engine from all others; JSON-able."""
    folder: Path | None = None
    """Each process keeps its finished batches in a file here."""
    engine: Engine | None = None

    @cached_property
    def kept(self) -> KeptAnswers:
        """The finished batches of this process."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        return KeptAnswers(self.folder and self.folder / f"{rank}.jsonl")

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """The context in which `model` may be asked."""
        return self.engine.running(model) if self.engine else nullcontext()

    def respond(
        self,
        module: SecVecModule,
        prompts: Sequence[tuple[list[int], list[int]]],
        max_new_tokens: int,
        seed: int | None,
    ) -> list[Answer]:
        """The answers to one batch of prompts, each with the beginning of its answer, which the text includes.

        A batch that was kept is not generated again.
        """
        tokenizer = module.backbone.tokenizer
        stop = stop_ids(tokenizer)
        key = content_key([Answer._fields, self.identity, prompts, max_new_tokens, stop, seed])
        answers = self.kept.get(key)
        if answers is None:
            asked = [prompt + begun for prompt, begun in prompts]
            if self.engine:
                ids = self.engine.answer(asked, max_new_tokens, stop, seed)
            else:
                ids = generate(module.model, asked, max_new_tokens, stop, seed)
            texts = decode([begun + new for (_, begun), new in zip(prompts, ids, strict=True)], tokenizer)
            answers = [Answer(text, not set(stop) & set(new)) for text, new in zip(texts, ids, strict=True)]
            self.kept.add(key, answers)
        return answers


@torch.no_grad()
def generate(
    model: Any, prompts: Prompts, max_new_tokens: int, stop: Sequence[int], seed: int | None = None
) -> list[list[int]]:
    """New token ids after each prompt of one left-padded batch; behind one in `stop` there is padding.

    The settings are ours alone: what the model's generation_config.json says (beams, penalties, forced or forbidden
    tokens) has no effect.
    """
    length, device = max(map(len, prompts)), next(model.parameters()).device
    ids = torch.tensor([[PAD] * (length - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    sampling: dict[str, Any] = {"do_sample": False}
    if seed is not None:
        sampling = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=list(stop), pad_token_id=PAD, **sampling)
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    given, bare.generation_config = bare.generation_config, GenerationConfig()  # generate() takes from it what we leave
    try:
        with torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            # a sharded model needs no `synced_gpus`: see `in_step`
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=False)
    finally:
        bare.generation_config = given
    new: list[list[int]] = out[:, length:].tolist()
    return new
