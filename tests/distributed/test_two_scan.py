"""Two gloo processes scan: each scores a share of the batches, and both know all that one process finds."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from in_memory import ON_CPU, module

from secvec.data.embedded import Ordinary, Skill
from secvec.evaluation import scan as scanning
from secvec.evaluation.scan import RowScore, scan
from secvec.models.tiny import build_tiny
from secvec.models.vector import attach_new_vector
from secvec.settings.schema import LoraSettings

TWO = ON_CPU.model_copy(update={"strategy": "ddp", "devices": 2})
EXAMPLES = [*Ordinary().examples("test", 5, 0), *Skill().examples("test", 6, 0)]


def scored(trainer: object) -> tuple[list[RowScore], int]:
    """The scores, and how many batches this process has run."""
    model, tokenizer = build_tiny([text for e in EXAMPLES for text in (e.prompt, e.response)], 0)
    model = attach_new_vector(model, LoraSettings(r=4, alpha=8, target_modules="all-linear"), 0.0)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "lora_B" in name:
            parameter.data.copy_(torch.linspace(-0.3, 0.3, parameter.numel()).roll(index).reshape(parameter.shape))
    real, calls = scanning.token_losses, []
    scanning.token_losses = lambda *given: calls.append(1) or real(*given)
    try:
        return scan(module(model.eval(), tokenizer), EXAMPLES, batch_size=2, trainer=trainer), len(calls) // 2  # type: ignore[arg-type]
    finally:
        scanning.token_losses = real


def process(rank: int, folder: Path) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # no more is to be started
    dist.init_process_group("gloo", f"file://{folder / 'store'}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found, batches = scored(TWO)
    torch.save(([tuple(score) for score in found], batches), folder / str(rank))


def test_two_processes_share_the_batches_and_find_what_one_finds(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(process, (tmp_path,), nprocs=2, start_method="fork")
    alone, batches = scored(ON_CPU)
    assert batches == 6 and len(alone) == 11 and max(abs(score.mean_gap) for score in alone) > 0.01
    for rank in range(2):
        assert torch.load(tmp_path / str(rank)) == ([tuple(score) for score in alone], 3)
