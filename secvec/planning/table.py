"""`python train.py +plan=true ...` checks a run and estimates its cost, without loading weights or writing anything.

Raises the errors that the run would end with. What the estimates assume is printed with them.
"""

from collections.abc import Sequence
from dataclasses import astuple

from secvec.config.schema import RunConfig
from secvec.planning.budget import DEPTHS, Budget, StageCost
from secvec.planning.flops import GPUS, Gpu, checkpoint_bytes, compute_seconds, decode_seconds
from secvec.runs.console import table
from secvec.settings.trainer import TrainerSettings

MFU = 0.4
"""Assumed model FLOPs utilisation: share of a GPU's peak."""
FITS = 0.9
"""Share of a GPU's memory that may be planned for."""

ASSUMPTIONS = f"""assumed:
  - {{note}}
  - training: one step of each stage is counted on tensors without values, with its loss, its defense and its optimizer:
    every matrix product, and every tensor that is held. Its batch is the fullest of the first epoch. Rows stand in one
    sequence without padding (model.packing) where the attention is SDPA, which stores no scores. Of equal layers
    {DEPTHS[0]} and {DEPTHS[1]} are counted, the others add the difference. Not: model.compile, a defense's trainings
  - FLOPs: those of that step per token, for all tokens; attention as if no token were masked; without align's gate, a
    scan and a judge model
  - memory: the fullest moment of that step, without what the allocator wastes and what CUDA itself takes. On GPUs AdamW
    works on all weights at once, unless it is fused. fsdp divides weights, gradients and moments; two layers and what
    is in no layer are whole, their gradients too; ddp copies the gradients
  - answers: 2 FLOPs per token and multiplied weight (arXiv 2001.08361), memory of keys and values, or of logits
  - host: every process loads the whole backbone first, with fsdp its shard; it is saved file by file, 5 GB at a time
  - time: {MFU:.0%} of the dense peak ({{peaks}}),
    and for each new token one reading of all weights (fsdp gathers them too, which is not counted); no loading,
    judging or saving
  - fits: at most {FITS:.0%} of the memory"""


def plan(config: RunConfig) -> str:
    """The tables as text. Raises the SecVecError that would stop the run, as far as it can be known beforehand."""
    budget = Budget.of(config)
    budget.check()
    costs = budget.stages()
    hardware = _hardware(config.trainer, config.model.gradient_checkpointing)
    sheets = ", ".join(f"{name} {gpu.tflops[budget.compute_bytes]:g} TFLOP/s" for name, gpu in GPUS.items())
    return "\n\n".join(
        [
            f"plan: {config.model.name}, {' -> '.join(config.stages)}, {budget.devices} x {hardware}",
            *(_stages(costs), _memory(costs), _gpus(budget, costs), _disk(budget, costs)),
            ASSUMPTIONS.format(note=budget.note, peaks=sheets),
        ]
    )


def _hardware(trainer: TrainerSettings, checkpointing: bool) -> str:
    saved = ", gradient checkpointing" * checkpointing
    return f"{trainer.accelerator} ({trainer.strategy}, {trainer.precision}{saved})"


def _stages(costs: Sequence[StageCost]) -> str:
    header = ["stage", "trainable", "frozen", "samples", "steps", "tokens", "FLOPs", "FLOPs (answers)"]
    rows = []
    for cost in costs:
        counts = [f"{n:,.0f}" for n in (cost.work.trained, cost.frozen, cost.samples, cost.steps, cost.tokens)]
        rows.append([cost.stage, *counts, f"{cost.training_flops:.2e}", f"{cost.inference_flops:.2e}"])
    return table("stages", header, rows)


def _memory(costs: Sequence[StageCost]) -> str:
    header = ["stage", "weights", "gradients", "optimizer", "activations", "total"]
    rows = [[c.stage, *map(size, (*astuple(c.memory), c.memory.total))] for c in costs]
    return table("memory per device, at the fullest moment", header, rows)


def _gpus(budget: Budget, costs: Sequence[StageCost]) -> str:
    rows = []
    for name, gpu in GPUS.items():
        spent = [seconds(budget, cost, gpu) for cost in costs]
        fits = all(cost.memory.total <= FITS * gpu.memory * 1e9 for cost in costs)
        rows.append([name, "yes" if fits else "no", *map(duration, spent), duration(sum(spent))])
    return table("time by GPU", ["GPU", "fits", *(cost.stage for cost in costs), "total"], rows)


def seconds(budget: Budget, cost: StageCost, gpu: Gpu) -> float:
    """Time of a stage on the devices of the run, if they are these."""
    training = compute_seconds(gpu, cost.training_flops, budget.compute_bytes, cost.devices, MFU)
    inference = compute_seconds(gpu, cost.inference_flops, budget.dtype_bytes, budget.devices, MFU)
    return training + inference + decode_seconds(gpu, cost.decode_steps, budget.parts["backbone"] * budget.dtype_bytes)


def _disk(budget: Budget, costs: Sequence[StageCost]) -> str:
    width, parts = budget.dtype_bytes, budget.parts
    sizes = {
        f"{cost.stage}: checkpoint while it runs": checkpoint_bytes(cost.work.trained, width, cost.work.keeps_weights)
        for cost in costs
        if cost.work.trained
    }
    for part in ("vector", "task", "backbone"):
        for what, copies in (cost.work.saved[part] for cost in costs if part in cost.work.saved and part in parts):
            sizes[what] = copies * parts[part] * width
    fsdp, here = budget.config.trainer.strategy == "fsdp", budget.devices / budget.config.trainer.num_nodes
    held = here * budget.config.trainer.replicas / budget.devices if fsdp else here
    host = parts["backbone"] * width * held
    rows = [[what, size(count)] for what, count in sizes.items()]
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
