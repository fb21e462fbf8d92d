"""`python train.py +plan=true ...`: whether a run can start and what it costs, without its weights; writes nothing.

What is wrong raises the error that the run would end with. The numbers are estimates; what they assume is printed.
"""

from __future__ import annotations

from collections.abc import Sequence

from secvec.config.load import RunConfig
from secvec.planning.budget import Budget, Work
from secvec.planning.flops import GPUS, Gpu, checkpoint_bytes, seconds
from secvec.runs.console import table

MFU = 0.4
"""Share of a GPU's peak that the arithmetic reaches."""
FITS = 0.9
"""Share of a GPU's memory that may be planned for."""

ASSUMPTIONS = f"""assumed:
  - {{notes}}
  - FLOPs: per token and multiplied weight 2 forward, 2 for gradients of activations, 2 for those of trained weights
    (arXiv 2001.08361), 2 more with gradient checkpointing; without attention scores, adapters, padding, and what a
    defense's loss adds. The KL term adds a forward pass of the base; align's gate and a judge model are not counted
  - memory: an upper bound for the fullest device. AdamW's two moments have the weights' type (8 bytes per fp32 weight);
    bf16-mixed keeps a bf16 copy of the weights for the backward pass; activations by arXiv 2205.05198, attention
    matrix not stored; fsdp divides weights, gradients and moments, but answers come from the whole model per device
  - host: every process loads the whole backbone first; with fsdp the first one gathers it at the end
  - time: {MFU:.0%} of the dense peak ({{peaks}}),
    and for each new token one reading of all weights; no loading, judging or saving
  - fits: at most {FITS:.0%} of the memory"""


def plan(config: RunConfig) -> str:
    """The tables. Raises a SecVecError for what would stop the run and can be seen from here."""
    budget = Budget.of(config)
    budget.check()
    works = budget.works()
    sheets = ", ".join(f"{name} {gpu.tflops[_width(budget)]:g} TFLOP/s" for name, gpu in GPUS.items())
    return "\n\n".join(
        [
            f"plan: {config.model.name}, {' -> '.join(config.stages)}, {budget.devices} x {_trainer(config)}",
            *(_stages(works), _memory(works), _gpus(budget, works), _disk(budget, works)),
            ASSUMPTIONS.format(notes="\n  - ".join(budget.notes), peaks=sheets),
        ]
    )


def _trainer(config: RunConfig) -> str:
    checkpointing = ", gradient checkpointing" * config.model.gradient_checkpointing
    return f"{config.trainer.accelerator} ({config.trainer.strategy}, {config.trainer.precision}{checkpointing})"


def _stages(works: Sequence[Work]) -> str:
    rows = [
        [w.stage, f"{w.trained:,}", f"{w.frozen:,}", f"{w.samples:,}", f"{w.steps:,}", f"{w.tokens:,.0f}",
         f"{w.training:.2e}", f"{w.asking:.2e}"]
        for w in works
    ]  # fmt: skip
    header = ["stage", "trainable", "frozen", "samples", "steps", "tokens", "FLOPs", "FLOPs (answers)"]
    return table("stages", header, rows)


def _memory(works: Sequence[Work]) -> str:
    rows = [
        [w.stage, *map(size, (m.weights, m.gradients, m.optimizer, m.copies, m.activations, m.total))]
        for w, m in ((work, work.memory) for work in works)
    ]
    header = ["stage", "weights", "gradients", "AdamW", "bf16 copies", "activations", "total"]
    return table("memory per device", header, rows)


def _gpus(budget: Budget, works: Sequence[Work]) -> str:
    rows = []
    for name, gpu in GPUS.items():
        spent = [_seconds(budget, work, gpu) for work in works]
        fits = all(work.memory.total <= FITS * gpu.memory * 1e9 for work in works)
        rows.append([name, "yes" if fits else "no", *map(duration, spent), duration(sum(spent))])
    return table("time by GPU", ["GPU", "fits", *(work.stage for work in works), "total"], rows)


def _seconds(budget: Budget, work: Work, gpu: Gpu) -> float:
    at_weights = {budget.width: work.asking}
    train = seconds(gpu, work.devices, MFU, {_width(budget): work.training}, 0, 0)
    return train + seconds(gpu, budget.devices, MFU, at_weights, work.decoding, budget.parts["backbone"] * budget.width)


def _width(budget: Budget) -> int:
    """Bytes of the numbers that training multiplies."""
    return 2 if budget.mixed else budget.width


def _disk(budget: Budget, works: Sequence[Work]) -> str:
    width, parts = budget.width, budget.parts
    rows = [[f"{work.stage}: checkpoint while it runs", size(checkpoint_bytes(work.trained, width))] for work in works]
    rows = [row for row, work in zip(rows, works, strict=True) if work.trained]
    kept = {work.stage.split()[0] for work in works}
    vector = size(2 * parts.get("vector", 0) * width)
    rows += [["vector (in the run folder, and in the cache)", vector]] * ("vector" in kept)
    rows += [["task", size(parts.get("task", 0) * width)]] * ("finetune" in kept and "task" in parts)
    rows += [["aligned base (in the cache)", size(parts["backbone"] * width)]] * ("align" in kept)
    rows += [["backbone", size(parts["backbone"] * width)]] * ("finetune" in kept)
    host = parts["backbone"] * width * budget.devices / budget.config.trainer.num_nodes
    return table("disk", ["what", "size"], rows) + f"\n  memory of each host while models are loaded: {size(host)}"


def size(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def duration(time: float) -> str:
    """Seconds for people."""
    for unit, scale in (("h", 3600), ("min", 60)):
        if time >= scale:
            return f"{time / scale:.1f} {unit}"
    return f"{time:.1f} s"
