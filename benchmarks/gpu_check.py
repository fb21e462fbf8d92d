"""Runs on a GPU, within ten minutes, what has run on CPUs only.

    python benchmarks/gpu_check.py [--only trains,answers] [--minutes 10] [--to FILE]
    python benchmarks/gpu_check.py --device cpu     a dry run: what needs a GPU is skipped

Every check is a process with a time limit of its own, so that none stops the others, and has one verdict: pass, fail
or skipped, with the reason. The record goes into results/performance/, its table into docs/performance.md; a dry run
writes neither unless `--to` names a file. Fused losses (liger-kernel, cut-cross-entropy) are no part of secvec, and
`model.quantization=nf4` and `model.compile` have no check yet.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from measure import MEASURED, PAGE, RESULTS, machine, result, run, small_model, start
from pages import keep, show

RECORDS = RESULTS / "gpu_check.json"
TITLE = "On a GPU"
HERE = Path(__file__).parent
STEPS = 5
SMALL = """
model.align.num_undesired=60 model.align.num_benign=120 model.align.epochs=1 model.align.gate=null
model.align.num_threads=1 num_threads=1
vector.num_samples=24 vector.num_kl=24 vector.epochs=2 vector.batch_size=12 vector.kl_batch_size=12
vector.gate.num_prompts=4 vector.gate.min_behavior_rate=0 vector.gate.min_loss_drop=null
data.num_harmful=24 data.num_benign=24 finetune.epochs=2 finetune.batch_size=12
telemetry.every_n_steps=2 telemetry.num_samples=4
evaluation.num_prompts=6 evaluation.max_new_tokens=24 evaluation.num_leak_prompts=2 generation=hf
""".split()
"""The whole method on the tiny model, in seconds of computing."""


@dataclass(frozen=True)
class Result:
    """What a check found."""

    verdict: str
    """`pass`, `fail` or `skipped`."""
    text: str
    """What was measured, or why there is nothing."""
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """What the checks run on."""

    device: str
    """`cpu` or `cuda`."""
    gpus: int
    model: Path
    """For the checks of steps and answers."""

    @property
    def arguments(self) -> list[str | Path]:
        """For the other benchmarks."""
        return ["--model", self.model, "--device", self.device]


@dataclass(frozen=True)
class Check:
    """One line of the record."""

    name: str
    run: Callable[[Machine], Result]
    limit: float = 90
    """Seconds after which it is ended."""
    packages: Sequence[str] = ()
    """What must be installed."""
    needs_gpu: bool = False

    def skipped(self, here: Machine) -> str:
        """Why it cannot run here; empty: it can."""
        if missing := [name for name in self.packages if find_spec(name) is None]:
            return f"{missing[0]} is not installed"
        return "no GPU" if self.needs_gpu and here.device == "cpu" else ""


def verdict(good: bool, text: str, **numbers: Any) -> Result:
    """Passed or failed."""
    return Result("pass" if good else "fail", text, numbers)


def trains(trainer: str, precision: str, here: Machine) -> Result:
    """The whole method by `train.py`: it ends well, and the losses are numbers."""
    given = [f"trainer={trainer}", f"trainer.precision={precision}"]
    if here.device == "cpu":
        given = ["trainer=cpu" if trainer == "gpu" else given[0], given[1], "trainer.accelerator=cpu"]
    if trainer != "gpu":
        given.append(f"trainer.devices={here.gpus or 2}")
    from secvec.tracking.csv_file import read_curves

    with tempfile.TemporaryDirectory() as folder:
        run(["train.py", *SMALL, *given, f"run_dir={folder}/run", f"paths.cache={folder}/cache"])
        record = json.loads(Path(folder, "run", "record.json").read_text(encoding="utf-8"))
        curves = read_curves(Path(folder, "run", "metrics.csv"), "finetune")
    losses = [values["train/loss"] for _, values in curves if "train/loss" in values]
    good = record["status"] == "completed" and bool(losses) and all(map(math.isfinite, losses))
    processes = record["processes"]["finetune"]
    text = f"{record['status']}, {processes} processes, losses from {losses[0]:.4f} to {losses[-1]:.4f}"
    return verdict(good, text, processes=processes, losses=losses)


def step(way: str, precision: str, here: Machine) -> dict[str, Any]:
    """The measurement of some training steps."""
    given = ["--one", way, "--steps", str(STEPS), "--precision", precision]
    return run([HERE / "trainers.py", *given, *here.arguments]).measured


def rate(measured: Mapping[str, Any]) -> str:
    """`secvec 1234 tokens/s in 5.6 GB`."""
    speed = measured["tokens"] / measured["seconds"]
    return f"{measured['way']} {speed:.0f} tokens/s in {measured['peak_bytes'] / 1e9:.2f} GB"


def alike(ways: tuple[str, str], precision: str, within: float, here: Machine) -> Result:
    """Two ways of training have the same losses. `within`: relative to the loss."""
    one, other = (step(way, precision, here) for way in ways)
    gaps = [abs(a / b - 1) for a, b in zip(one["losses"], other["losses"], strict=True)]
    text = f"losses differ by {max(gaps):.1e}, allowed {within:g}; {rate(one)}, {rate(other)}"
    return verdict(all(gap <= within for gap in gaps), text, runs=[one, other])  # a loss that is no number fails too


def limit(precision: str, here: Machine) -> Result:
    """Of the matrix products of a step, as much as a step of secvec reaches."""
    most, ours = step("limit", precision, here), step("secvec", precision, here)
    reached = most["seconds"] / ours["seconds"]
    return verdict(True, f"{rate(ours)}: {reached:.0%} of the matrix products alone", runs=[most, ours])


def products(here: Machine) -> Result:
    """The rate of one matrix product of 4,096 rows and columns."""
    import torch

    rates = {}
    for kind in (torch.float32, torch.bfloat16):
        size = 4096 if here.device == "cuda" else 256
        a, b = (torch.randn(size, size, device=here.device, dtype=kind) for _ in range(2))
        for repeats in (3, 20):
            began = time.perf_counter()
            for _ in range(repeats):
                a @ b
            if here.device == "cuda":
                torch.cuda.synchronize()
        rates[str(kind).removeprefix("torch.")] = 20 * 2 * size**3 / (time.perf_counter() - began) / 1e12
    text = ", ".join(f"{value:.3g} TFLOP/s in {name}" for name, value in rates.items())
    return verdict(all(value > 0 for value in rates.values()), text, **rates)


def kl_term(here: Machine) -> Result:
    """The vector stage with the KL term and without: a new vector changes nothing, so the first loss is the same."""
    given = ["--steps", str(STEPS), *here.arguments]
    without, with_kl = (
        run([HERE / "vector_stage.py", "--one", f"{way}_kl", *given]).measured for way in ("without", "with")
    )
    gap = abs(without["losses"][0] - with_kl["losses"][0])
    text = f"first losses differ by {gap:.1e}; {with_kl['seconds'] / without['seconds']:.2f} of the time without KL"
    return verdict(gap <= 1e-3, text, runs=[without, with_kl])


def answers(ways: tuple[str, str], share: float, here: Machine) -> Result:
    """Two ways of answering give the same answers to at least that share of the prompts."""
    given = ["--prompts", "32", "--new-tokens", "24", *here.arguments]
    one, other = (run([HERE / "generation.py", "--one", way, *given]).measured for way in ways)
    same = sum(a == b for a, b in zip(one["answers"], other["answers"], strict=True)) / len(one["answers"])
    speeds = ", ".join(f"{m['way']} {len(m['answers']) / m['seconds']:.1f} prompts/s" for m in (one, other))
    return verdict(
        same >= share, f"{same:.0%} of the answers equal, at least {share:.0%} asked; {speeds}", runs=[one, other]
    )


CHECKS = [
    Check("products", products, 60),
    Check("merged beside adapter", partial(alike, ("merged", "adapter"), "32-true", 1e-3)),
    Check("packed beside padded", partial(alike, ("secvec", "secvec_padded"), "32-true", 1e-3)),
    Check("secvec beside the Hugging Face Trainer, 32-true", partial(alike, ("secvec", "hf"), "32-true", 1e-3)),
    Check(
        "secvec beside the Hugging Face Trainer, bf16-mixed", partial(alike, ("secvec", "hf"), "bf16-mixed", 2e-2),
        needs_gpu=True,
    ),
    Check("secvec beside TRL, bf16-mixed", partial(alike, ("secvec", "trl"), "bf16-mixed", 2e-2), 90, ["trl"], True),
    Check("LoRA beside the Hugging Face Trainer", partial(alike, ("secvec_lora", "hf_lora"), "32-true", 1e-3)),
    Check("limit, bf16-mixed", partial(limit, "bf16-mixed"), needs_gpu=True),
    Check("KL term", kl_term),
    *(
        Check(f"trains, trainer={trainer}, {kind}", partial(trains, trainer, kind), 90, (), kind == "16-mixed")
        for trainer in ("gpu", "ddp", "fsdp")
        for kind in ("32-true", "bf16-mixed", "16-mixed")
        if (trainer, kind) != ("fsdp", "16-mixed")  # FSDP2 has no loss scaler
    ),
    Check("answers, secvec beside a loop", partial(answers, ("secvec", "plain"), 0.9)),
    Check("answers, vLLM beside secvec", partial(answers, ("vllm", "secvec"), 0.5), 180, ["vllm"], True),
]  # fmt: skip


def checked(command: Sequence[str | Path], limit: float) -> Result:
    """Runs a check as a process of its own, which prints its result."""
    process = start(command, own_group=True)
    try:
        out = process.communicate(timeout=limit)[0].decode("utf-8", "replace")
    except subprocess.TimeoutExpired:
        return Result("fail", f"not done within {limit:.0f} s")
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started, too
        process.wait()
    try:
        return Result(**result(out))
    except StopIteration:
        lines = [line.strip() for line in out.splitlines() if line.strip()]
        return Result(
            "fail", lines[-1][:300] if lines else f"ended with code {process.returncode}", {"end": lines[-15:]}
        )


def gpu_names() -> list[str]:
    """Of the GPUs that are here. Does not ask torch, which would hold memory on them."""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    except (FileNotFoundError, subprocess.CalledProcessError):
        return []


def table(record: Mapping[str, Any]) -> str:
    """One line for each check."""
    lines = ["| check | verdict | what was found | s |", "| --- | --- | --- | --- |"]
    for one in record["checks"]:
        text = one["text"].replace("|", "\\|")
        lines.append(f"| {one['name']} | {one['verdict']} | {text} | {one['seconds']:.0f} |")
    about, gpus = record["machine"], record["gpus"]
    where = [f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU", record["model"]]
    where += [f"{name} {version}" for name, version in about["versions"].items()]
    return "\n".join([*lines, "", f"{', '.join(where)}; commit {about['commit'][:7]}."])


def run_all(checks: Sequence[Check], here: Machine, seconds: float) -> list[dict[str, Any]]:
    """One verdict for each check, as long as there is time."""
    began, found = time.perf_counter(), []
    for check in checks:
        start, left = time.perf_counter(), seconds - (time.perf_counter() - began)
        reason = check.skipped(here) or ("" if left > 5 else f"the {seconds:.0f} s are over")
        command = [__file__, "--one", check.name, *here.arguments, "--gpus", str(here.gpus)]
        one = Result("skipped", reason) if reason else checked(command, min(check.limit, left))
        found.append({"name": check.name, "seconds": time.perf_counter() - start, **asdict(one)})
        print(f"{one.verdict:8}{check.name}: {one.text}", flush=True)
    return found


def main() -> int:
    """Runs the checks and writes their record. Returns 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--only", default="", help="beginnings of the names of checks")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--to", type=Path, help="where the record goes")
    parser.add_argument("--table", action="store_true", help="make the table again")
    parser.add_argument("--model", type=Path, help="folder of a causal LM; default: SmolLM2, or the tiny model")
    parser.add_argument("--gpus", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        (check,) = (check for check in CHECKS if check.name == given.one)
        print("\n" + MEASURED + json.dumps(asdict(check.run(Machine(given.device, given.gpus, given.model)))))
        return 0
    if given.table:
        show(table(json.loads(RECORDS.read_text(encoding="utf-8"))), __file__, PAGE, TITLE)
        return 0
    gpus = gpu_names() if given.device == "cuda" else []
    if given.device == "cuda" and not gpus:
        sys.exit("error: nvidia-smi shows no GPU here; a dry run without one: --device cpu")
    wanted = [check for check in CHECKS if check.name.startswith(tuple(given.only.split(",")))]
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        model = given.model or small_model(Path(folder) / "tiny")
        checks = run_all(wanted, Machine(given.device, len(gpus), model), 60 * given.minutes)
    record = {"machine": about, "gpus": gpus, "model": model.name, "checks": checks}
    if given.to or gpus:
        keep(record, given.to or RECORDS)
    if gpus and not given.to:
        show(table(record), __file__, PAGE, TITLE)
    verdicts = [check["verdict"] for check in checks]
    print(", ".join(f"{verdicts.count(name)} {name}" for name in ("pass", "fail", "skipped")))
    return int("fail" in verdicts)


if __name__ == "__main__":
    sys.exit(main())
