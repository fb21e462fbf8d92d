"""Two gloo processes ask: they say what one does, each goes on from its own file, one of them asks an engine."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from in_memory import ON_CPU, generate
from torch import nn

from secvec.data.embedded import Ordinary, Skill
from secvec.evaluation import generation
from secvec.evaluation.generation import GenerationBackend
from secvec.models.tiny import build_tiny
from secvec.settings.schema import EvaluationSettings

SETTINGS = EvaluationSettings(num_prompts=8, batch_size=2, max_new_tokens=6, num_leak_prompts=0)
TWO = ON_CPU.model_copy(update={"strategy": "ddp", "devices": 2})
EXAMPLES = [*Ordinary().examples("test", 5, 0), *Skill().examples("test", 6, 0)]


def world() -> tuple[nn.Module, Any]:
    """In float64, and with answers that depend on the prompt: there are no near ties that padding could turn."""
    model, tokenizer = build_tiny([text for e in EXAMPLES for text in (e.prompt, e.response)], 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    return model.double().eval(), tokenizer


class Reversed:
    """An engine that answers with the prompt, backwards."""

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def answer(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop: Any, seed: Any) -> list[list[int]]:
        assert dist.get_rank() == 0
        return [list(prompt)[::-1] for prompt in prompts]


def counted(ask: Callable[[], list[str]], stop_at: int | None = None) -> tuple[list[str], int]:
    """What is answered and how many batches this process asks; `stop_at`: it is cut off there."""
    real, calls = generation.generate, 0

    def answer(*given: Any) -> Any:
        nonlocal calls
        if calls == stop_at:
            raise KeyboardInterrupt
        calls += 1
        return real(*given)

    generation.generate = answer
    try:
        return ask(), calls
    except KeyboardInterrupt:
        return [], calls
    finally:
        generation.generate = real


def process(rank: int, folder: Path, cut: bool) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # no more is to be started
    dist.init_process_group("gloo", f"file://{folder / f'store-{cut}'}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model, tokenizer = world()
    source = GenerationBackend(["a model"], folder / "answers")

    def ask() -> list[str]:
        return generate(model, tokenizer, EXAMPLES, SETTINGS, source, TWO)

    if cut:  # both are cut off after their first batch, before they meet
        assert counted(ask, stop_at=1) == ([], 1)
    else:
        torch.save((counted(ask), counted(ask)), folder / f"said-{rank}")
        engine = GenerationBackend(engine=Reversed())
        torch.save(generate(model, tokenizer, EXAMPLES, SETTINGS, engine, TWO), folder / f"engine-{rank}")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_say_what_one_does_and_go_on(tmp_path: Path) -> None:
    for cut in (True, False):
        torch.multiprocessing.start_processes(process, (tmp_path, cut), nprocs=2, start_method="fork")
        assert {file.name for file in (tmp_path / "answers").iterdir()} == {"0.jsonl", "1.jsonl"}
    alone = generate(*world(), EXAMPLES, SETTINGS)
    assert len(set(alone)) > 5
    for rank, prompts in ((0, 6), (1, 5)):
        (first, asked), (second, asked_again) = torch.load(tmp_path / f"said-{rank}")
        assert first == second == alone
        assert (asked, asked_again) == (-(-prompts // 2) - 1, 0)
    engine = torch.load(tmp_path / "engine-0")
    assert engine == torch.load(tmp_path / "engine-1") != alone
