"""What `+plan=true` says beside what training takes: `python benchmarks/plan.py [--steps 3] [--rounds 2]`.

Llama-like models of three sizes with random weights. The finetune stage (whole model, float32, the vector active) and
the vector stage make a few steps, each in a process of its own, and the plan of the same rows is made beside it. Below:
the plans of Llama 2 on H100s. The record goes into results/performance/, its tables into docs/performance.md; `--table`
makes the tables again.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from limits import linear_layers, product_seconds
from measure import MEASURED, PAGE, RESULTS, footer, machine, run, spread
from pages import keep, show
from trainers import LORA, OPTIMIZER, Clock, Job, arguments, job_of, lightning

RECORDS = RESULTS / "plan.json"
TITLE = "Plans beside measurements"
SIZES = {"small": (512, 1408, 8, 8), "middle": (768, 2048, 12, 12), "large": (1024, 2816, 16, 16)}
"""Hidden size, size of the MLP, layers, heads; all with a vocabulary of 16,000."""
STAGES = ("finetune", "vector")
BATCH, KL_BATCH = 4, 3
RUN = f"""
recipe=small_llm behavior=harmful_redteam data=alpaca judge=none trainer=cpu optimizer=adamw_fused
finetune.batch_size={BATCH} finetune.epochs=1 vector.batch_size={BATCH} vector.kl_batch_size={KL_BATCH} vector.epochs=1
vector.r={LORA.r} vector.alpha={LORA.alpha} vector.target_modules=[q_proj,v_proj] data.num_benign=0
telemetry.every_n_steps=0
""".split()
"""The settings of what is measured; the data are not read, its rows are those of the benchmark."""
LLAMAS = ("7b", "13b", "70b")
H100S = {
    1: "trainer.devices=1 finetune.batch_size=16 vector.batch_size=10",
    8: "trainer.devices=8 finetune.batch_size=16 vector.batch_size=10",
    64: "trainer.devices=8 trainer.num_nodes=8 finetune.batch_size=80 vector.batch_size=100 vector.kl_batch_size=64",
}
"""Each GPU has a row at least."""
PLANNED = "experiment=paper/harmlarge trainer=fsdp"
CHECKPOINTING = "model.gradient_checkpointing=true"


def make_model(size: str, folder: Path) -> Path:
    """A model with random weights, its tokenizer, and a vector for it below."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from secvec.models.tiny import build_tiny
    from secvec.models.vector import attach_new_vector, save_adapter

    hidden, mlp, layers, heads = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16_000, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=1024, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    build_tiny(["a"], 0)[1].save_pretrained(folder)
    vector = attach_new_vector(model, LORA, 0.0)
    with torch.no_grad():
        for name, parameter in vector.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.001)
    save_adapter(vector, vector.state_dict(), "vector", folder / "vector")
    return folder


def rows_of(job: Job) -> tuple[list[Any], list[Any]]:
    """The rows of the stage, and those beside them."""
    from secvec.data.batch import Encoded

    rows, kl = ([Encoded(ids, prompt) for ids, prompt in job.rows(n)] for n in (BATCH, KL_BATCH))
    return rows, kl if job.way == "vector" else []


def measure(job: Job, counts: bool) -> dict[str, Any]:
    """Of all steps: memory and FLOPs; or, where nothing is counted, the seconds of all but the first."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import secvec.planning.step  # noqa: F401  # counts attention on the CPU too
    from secvec.data.datamodule import GlobalBatchSampler
    from secvec.module import SecVecModule
    from secvec.settings.schema import ModelSettings

    given, kl = rows_of(job)
    sampler = GlobalBatchSampler(*zip(*[(len(r), n) for r, n in ((given, BATCH), (kl, KL_BATCH)) if r], strict=True), 0)
    both = [(row, n >= len(given)) for n, row in enumerate([*given, *kl])]
    rows = [both[i] for batch in sampler for i in batch]
    settings = ModelSettings(name="model", name_or_path=str(job.model))
    vector: Any = LORA.model_dump() | {"kl_weight": 1.0} if kl else job.model / "vector"
    torch.zeros(1, requires_grad=True).sum().backward()  # starts the threads of autograd
    before, clock = resident("VmRSS"), Clock(job.device)
    module = SecVecModule(job.way, settings, vector, optimizer=OPTIMIZER)
    with FlopCounterMode(display=False) if counts else _nothing() as flops:
        lightning(module, rows, BATCH + KL_BATCH * bool(kl), job, clock)
    if counts:
        return {"bytes": resident("VmHWM") - before, "flops": flops.get_total_flops()}
    return {"seconds": (clock.ends[job.steps] - clock.ends[0]) / job.steps}


@contextmanager
def _nothing() -> Iterator[Any]:
    yield None


def resident(name: str) -> int:
    """VmRSS: bytes of memory that this process holds now; VmHWM: the most it held."""
    ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def plan_of(job: Job, seconds: float) -> dict[str, Any]:
    """What the plan says of the same rows; which share of the rate of matrix products a step of `seconds` reaches."""
    from secvec.planning.budget import Budget
    from secvec.planning.lengths import Length

    rows, kl = rows_of(job)
    sizes = [Length([(row.num_prompt, len(row.input_ids) - row.num_prompt) for row in some]) for some in (rows, kl)]
    given = [f"model.name_or_path={job.model}", f"vector.num_samples={len(rows)}", f"data.num_harmful={len(rows)}"]
    budget = Budget.of(composed(*RUN, f"stage={job.way}", *given))
    lengths = dict(budget.lengths) | dict.fromkeys(("undesired", "vector"), sizes[0]) | {"kl": sizes[1]}
    cost = next(cost for cost in replace(budget, lengths=lengths).stages() if cost.stage == job.way)
    tokens, labels = (round(len(rows) / (job.steps + 1) * mean) for mean in (sum_of(sizes[0]), sizes[0].response))
    layers, head = linear_layers(job.model)
    weights = sum(count * out * into for (out, into), count in layers.items())
    products = 6 * (weights * tokens + head[0] * head[1] * labels)
    rate = products / product_seconds(job.model, tokens, labels, True, job.device, job.precision)
    share = cost.training_flops / (job.steps + 1) / seconds / rate
    plan = {"bytes": cost.memory.total, "flops": cost.training_flops, "parameters": budget.shape.parameters}
    return plan | {"seconds": seconds, "share": share}


def sum_of(length: Any) -> float:
    """Mean tokens of a row."""
    return float(length.prompt + length.response)


def composed(*overrides: str) -> Any:
    """The config of a run that is only planned."""
    from hydra import compose, initialize_config_dir

    from secvec.config.load import load
    from secvec.config.resolvers import register_resolvers
    from secvec.config.schema import RunConfig
    from secvec.settings.conf import CONF

    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return load(compose("train", ["run_dir=unused", *overrides]), RunConfig)


def plan_llama(size: str) -> list[dict[str, Any]]:
    """Memory per device and hours of the paper's largest experiment, with this model on H100s."""
    from secvec.planning.budget import Budget
    from secvec.planning.flops import GPUS
    from secvec.planning.table import FITS, seconds

    found, gpu = [], GPUS["H100-80GB"]
    model = f"model.name_or_path=meta-llama/Llama-2-{size}-chat-hf"
    for number, where in H100S.items():
        for way in ((), (CHECKPOINTING,)):
            budget = Budget.of(composed(*PLANNED.split(), model, *where.split(), *way))
            costs = budget.stages()
            found.append({
                "model": size, "gpus": number, "checkpointing": bool(way),
                "bytes": {cost.stage: cost.memory.total for cost in costs},
                "fits": all(cost.memory.total <= FITS * gpu.memory * 1e9 for cost in costs),
                "seconds": {cost.stage: seconds(budget, cost, gpu) for cost in costs},
            })  # fmt: skip
    return found


def table(record: Mapping[str, Any]) -> str:
    """Plan and measurement; then the plans that nobody has run."""
    head = ["parameters", "stage", "memory, planned", "measured", "error", "FLOPs, planned", "counted", "error"]
    head += ["s per step", "of the rate of matrix products"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    steps = record["steps"] + 1
    for one in record["runs"]:
        plan, seen, seconds = one["plan"], one["counted"], one["seconds"]
        cells = [f"{plan['parameters'] / 1e6:.0f} M", one["stage"]]
        cells += [f"{plan['bytes'] / 1e9:.2f} GB", f"{seen['bytes'] / 1e9:.2f} GB", _error(plan, seen, "bytes")]
        cells += [f"{plan['flops']:.3e}", f"{seen['flops']:.3e}", _error(plan, seen, "flops")]
        lines.append(f"| {' | '.join([*cells, spread(seconds, 2), spread(one['shares'], 2)])} |")
    how = f"{steps} steps of {BATCH} rows (vector: and {KL_BATCH} KL rows) of 40 to 400 tokens, float32, fused AdamW"
    lines += [
        "",
        footer(how, record["machine"]),
        "",
        f"The plan of `{PLANNED}` on H100s, by `+plan=true`; batches of 16, on 64 GPUs of 80:",
        "",
    ]
    head = ["Llama 2", "GPUs", "gradient checkpointing", "vector, GB per GPU", "finetune", "infer", "fits", "hours"]
    lines += [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for one in record["plans"]:
        cells = [one["model"], str(one["gpus"]), "yes" if one["checkpointing"] else "no"]
        cells += [f"{one['bytes'][stage] / 1e9:.0f}" for stage in ("vector", "finetune", "infer")]
        cells += ["yes" if one["fits"] else "no", f"{sum(one['seconds'].values()) / 3600:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _error(plan: Mapping[str, float], seen: Mapping[str, float], what: str) -> str:
    return f"{plan[what] / seen[what] - 1:+.1%}"


def main() -> None:
    """Measures all sizes and writes the record and its tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES))
    given = arguments(parser)
    if given.one:
        what, _, which = given.one.partition(":")
        if what == "make":
            result: Any = [str(make_model(size, given.model / size)) for size in which.split(",")]
        elif what == "llama":
            result = [plan for size in LLAMAS for plan in plan_llama(size)]
        else:
            given.one = which
            job = job_of(given)
            result = measure(job, True) if what == "count" else plan_of(job, measure(job, False)["seconds"])
        print(MEASURED + json.dumps(result))
        return
    if not given.table:
        about, runs = machine(), []
        # memory that is freed goes back at once, so that what is resident is what is held
        exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}

        def one(what: str, which: str, model: Path = Path()) -> Any:
            os.environ.update(exact if what == "count" else {})
            ran = run([__file__, "--one", f"{what}:{which}", "--steps", str(given.steps), "--model", model])
            for name in exact:
                os.environ.pop(name, None)
            print(f"{what} {which} {model.name}: {ran.seconds:.0f} s", flush=True)
            return ran.measured

        with tempfile.TemporaryDirectory() as folder:
            one("make", given.sizes, Path(folder))
            for size in given.sizes.split(","):
                for stage in STAGES:
                    counted = one("count", stage, Path(folder) / size)
                    found = [one("plan", stage, Path(folder) / size) for _ in range(given.rounds)]
                    shares = [each.pop("share") for each in found]
                    seconds = [each.pop("seconds") for each in found]
                    plan = {"plan": found[0], "counted": counted, "seconds": seconds, "shares": shares}
                    runs.append({"size": size, "stage": stage, **plan})
        plans = one("llama", "all")
        keep({"steps": given.steps, "rounds": given.rounds, "machine": about, "runs": runs, "plans": plans}, RECORDS)
    show(table(json.loads(RECORDS.read_text(encoding="utf-8"))), __file__, PAGE, TITLE)


if __name__ == "__main__":
    main()
