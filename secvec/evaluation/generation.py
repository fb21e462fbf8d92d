"""What generates responses: the model in memory or an engine, with finished batches kept on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from secvec.data.batch import PAD
from secvec.data.encode import decode, stop_ids
from secvec.data.prompts import Answer, Prompts
from secvec.errors import ConfigError
from secvec.evaluation.answer_cache import KeptAnswers
from secvec.evaluation.vllm import VllmEngine, backend_info, uses_vllm
from secvec.models.backbone import Backbone
from secvec.models.outline import inside_peft
from secvec.models.packing import rounding
from secvec.models.vector import vector_digest
from secvec.runs.keys import content_key
from secvec.runs.processes import rank_and_world
from secvec.settings.schema import GenerationSettings
from secvec.settings.trainer import TrainerSettings

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
        return KeptAnswers(self.folder and self.folder / f"{rank_and_world()[0]}.jsonl")

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """The context in which `model` generates."""
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


def generation_backend(
    backbone: Backbone,
    vector: Path | None,
    generation: GenerationSettings,
    trainer: TrainerSettings,
    folder: Path | None,
) -> GenerationBackend:
    """What generates for `backbone` with the saved `vector`; finished batches are kept in `folder`."""
    engine = None
    if uses_vllm(generation, trainer):
        if backbone.settings.quantization:
            raise ConfigError("model.quantization=nf4: vLLM would answer with unquantized weights. Set generation=hf")
        engine = VllmEngine(backbone.folder, vector, generation, backbone.settings.trust_remote_code)
    identity = [*backbone.identity, vector and vector_digest(vector), backend_info(generation, trainer)]
    return GenerationBackend(identity, folder, engine)


@torch.no_grad()
def generate(
    model: Any, prompts: Prompts, max_new_tokens: int, stop: Sequence[int], seed: int | None = None
) -> list[list[int]]:
    """New token ids after each prompt of one left-padded batch; behind one in `stop` there is padding.

    The settings are ours alone: what the model's generation_config.json says (beams, penalties, forced or forbidden
    tokens) has no effect.
    """
    if len(prompts) > 1 and not takes_left_padding(model):
        return [generate(model, [prompt], max_new_tokens, stop, seed)[0] for prompt in prompts]
    length, device = max(map(len, prompts)), next(model.parameters()).device
    ids = torch.tensor([[PAD] * (length - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    sampling: dict[str, Any] = {"do_sample": False}
    if seed is not None:
        sampling = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
    config = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=list(stop), pad_token_id=PAD, **sampling)
    with _without_own_settings(model), torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        # a sharded model needs no `synced_gpus`: see `in_step`
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=False)
    new: list[list[int]] = out[:, length:].tolist()
    return new


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Inside, `generate` finds no settings of the model's own in the place of those that are not given."""
    bare = inside_peft(model)
    given, bare.generation_config = bare.generation_config, GenerationConfig()
    try:
        yield
    finally:
        bare.generation_config = given


PADDED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What `takes_left_padding` has found."""


def takes_left_padding(model: Any) -> bool:
    """Whether `model` answers a prompt behind padding as it does alone, as with state-space layers it may not.

    Tested once for each model. Without it, prompts are answered one by one.
    """
    bare = inside_peft(model)
    if bare not in PADDED:
        ids = torch.arange(3, 19, device=next(model.parameters()).device).reshape(2, 8)
        ids %= len(bare.get_input_embeddings().weight)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        config = GenerationConfig(max_new_tokens=1, pad_token_id=PAD, output_logits=True, return_dict_in_generate=True)

        def first_logits(ids: Tensor, mask: Tensor) -> Tensor:
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=False)
            found: Tensor = out.logits[0][0]
            return found

        with torch.no_grad(), _without_own_settings(model):
            padded, alone = first_logits(ids * mask, mask), first_logits(ids[:1, 3:], mask[:1, 3:])
        PADDED[bare] = float((padded - alone).abs().max()) <= rounding(alone.dtype) * float(alone.abs().max())
    return PADDED[bare]
