"""A plain and a protected fine-tune beside the Hugging Face Trainer and TRL: `make bench`.

The same model, the same rows in the same order, the same settings; each in a process of its own, one after another in
several rounds. Needs `make smollm2`. The record goes into results/performance/, its table into docs/performance.md;
`--table` makes the table again from the record.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

from pages import keep, show

from secvec.settings.schema import LoraSettings

ROOT = Path(__file__).parents[1]
RECORDS, PAGE = ROOT / "results" / "performance" / "trainers.json", ROOT / "docs" / "performance.md"
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
WAYS = {
    "hf": "Hugging Face Trainer",
    "trl": "TRL SFTTrainer",
    "trl_packing": "TRL SFTTrainer, `packing=True`",
    "secvec": "secvec, plain",
    "secvec_padded": "secvec, plain, `model.packing=false`",
    "merged": "secvec, with the vector",
    "adapter": "secvec, with the vector, `defense.activation=adapter`",
    "hf_lora": "Hugging Face Trainer and PEFT, LoRA",
    "trl_lora": "TRL SFTTrainer, LoRA",
    "secvec_lora": "secvec, plain, `tune=lora`",
}
BATCH = 8
PACKED = 2
"""Sequences of 1,024 tokens in a batch of TRL's packing: about as many tokens as the eight rows have."""
LR = 5e-5
LORA = LoraSettings(r=8, alpha=16, target_modules=["q_proj", "v_proj"])
Row = tuple[list[int], int]


def rows(steps: int) -> list[Row]:
    """Token ids and the length of the prompt; prompts and answers of 20 to 200 tokens each."""
    random = Random(0)
    lengths = [(random.randint(20, 200), random.randint(20, 200)) for _ in range(BATCH * (steps + 1))]
    return [([random.randint(100, 40_000) for _ in range(p + a)], p) for p, a in lengths]


class Clock:
    """When each step ended. The first step is a warm-up: allocations, first touch of the memory."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def tick(self) -> None:
        """At the end of a step."""
        self.ends.append(time.perf_counter())


def hugging_face(way: str, steps: int, clock: Clock) -> list[float]:
    """The losses of `steps` + 1 steps of the Trainer of transformers, or of TRL's."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    class Tick(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    lora = LoraConfig(r=LORA.r, lora_alpha=int(LORA.alpha), target_modules=LORA.target_modules, task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "learning_rate": LR, "use_cpu": True,
        "per_device_train_batch_size": PACKED if way == "trl_packing" else BATCH,
        "lr_scheduler_type": "constant", "max_steps": steps + 1, "adam_beta2": 0.95, "weight_decay": 0.0, "fp16": False,
        "bf16": False, "max_grad_norm": 1.0, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
        "train_sampling_strategy": "sequential", "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    if way.startswith("trl"):
        from trl import SFTConfig, SFTTrainer

        given = rows(2 * steps if way == "trl_packing" else steps)
        data = [{"input_ids": ids, "completion_mask": [0] * p + [1] * (len(ids) - p)} for ids, p in given]
        settings = SFTConfig(
            **common, packing=way == "trl_packing", max_length=1024, shuffle_dataset=False,
            completion_only_loss=True,
        )  # fmt: skip
        trainer: Any = SFTTrainer(
            model, args=settings, train_dataset=Dataset.from_list(data), processing_class=tokenizer, callbacks=[Tick()],
            peft_config=lora if way == "trl_lora" else None,
        )  # fmt: skip
    else:

        def collate(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
            longest = max(len(row["input_ids"]) for row in batch)
            pad = {"input_ids": 0, "labels": -100, "attention_mask": 0}
            return {
                name: torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in batch])
                for name, fill in pad.items()
            }

        data = [
            {"input_ids": ids, "labels": [-100] * p + ids[p:], "attention_mask": [1] * len(ids)}
            for ids, p in rows(steps)
        ]
        model = get_peft_model(model, lora) if way == "hf_lora" else model
        trainer = Trainer(
            model, TrainingArguments(**common), collate, train_dataset=Dataset.from_list(data), callbacks=[Tick()]
        )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def ours(way: str, steps: int, clock: Clock) -> list[float]:
    """The losses of `steps` + 1 steps of the finetune stage, with all that a run does in a step."""
    import lightning as L
    import torch
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader

    from secvec.data.batch import Encoded, collate
    from secvec.models.vector import attach_new_vector, save_adapter
    from secvec.module import SecVecModule
    from secvec.settings.schema import ModelSettings
    from secvec.settings.trainer import TrainerSettings
    from secvec.training.trainer import Training, fit

    losses: list[float] = []

    class Tick(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(float(outputs["loss"]))
            clock.tick()

        def on_train_epoch_end(self, *_: Any) -> None:
            raise KeyboardInterrupt  # the time of saving is not that of a step

    folder = Path(tempfile.mkdtemp())
    settings = ModelSettings(name="model", name_or_path=str(MODEL), packing=way != "secvec_padded")
    vector = None
    if way in ("merged", "adapter"):
        made = attach_new_vector(SecVecModule("infer", settings).backbone.load(), LORA, 0.0)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.001, generator=torch.Generator().manual_seed(0))
        vector = folder / "vector"
        save_adapter(made, made.state_dict(), "vector", vector)
        del made
    target = "secvec.defenses.security_vector.SecurityVector"
    module = SecVecModule(
        "finetune", settings, vector, {"_target_": target, "name": "v", "activation": way} if vector else None,
        LORA if way == "secvec_lora" else None, {"_target_": "torch.optim.AdamW", "lr": LR, "betas": [0.9, 0.95],
        "weight_decay": 0.0, "fused": True},
    )  # fmt: skip
    data: Any = DataLoader(
        [(Encoded(ids, p), False) for ids, p in rows(steps)],  # type: ignore[arg-type]
        BATCH,
        collate_fn=collate,
    )
    trainer = TrainerSettings.model_validate(
        {
            "accelerator": "cpu", "devices": 1, "strategy": "auto", "precision": "32-true", "gradient_clip_val": 1.0,
            "enable_progress_bar": False,
        }
    )  # fmt: skip
    training = Training(folder, "finetune", "optimizer.lr", 0, 1, trainer, validates=False)
    with suppress(KeyboardInterrupt):
        fit(module, data, training, CSVLogger(folder), folder / "out", [Tick()])
    return losses


def measure(way: str, steps: int) -> dict[str, Any]:
    """Seconds per step, real tokens per second, peak memory and losses of one way, in this process."""
    clock = Clock()
    losses = (hugging_face if way.startswith(("hf", "trl")) else ours)(way, steps, clock)
    seconds = clock.ends[steps] - clock.ends[0]
    tokens = sum(len(ids) for ids, _ in rows(steps)[BATCH:])
    if way == "trl_packing":
        tokens = steps * PACKED * 1024
    return {
        "way": way, "seconds": seconds, "tokens": tokens, "losses": losses,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """Where and with what it ran."""
    packages = ("torch", "transformers", "trl", "peft", "lightning")
    model_name = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {
        "cpu": model_name[0].partition(":")[2].strip() if model_name else platform.processor(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in packages},
        "commit": commit.stdout.strip(),
    }


def table(record: Mapping[str, Any]) -> str:
    """Medians over the rounds, with the lowest and the highest."""
    runs = record["runs"]
    rate = {way: [run["tokens"] / run["seconds"] for run in runs if run["way"] == way] for way in WAYS}
    base = statistics.median(rate["hf"])
    lines = ["| | tokens/s ↑ | of the HF Trainer's | peak memory ↓ | last loss |", "| --- | --- | --- | --- | --- |"]
    for way, name in WAYS.items():
        if not rate[way]:
            continue
        middle = statistics.median(rate[way])
        memory = statistics.median(run["peak_bytes"] for run in runs if run["way"] == way)
        loss = next(run["losses"][-1] for run in runs if run["way"] == way)
        spread = f"{middle:.0f} ({min(rate[way]):.0f} to {max(rate[way]):.0f})"
        lines.append(f"| {name} | {spread} | {middle / base:.2f} | {memory / 1e9:.1f} GB | {loss:.4f} |")
    about = record["machine"]
    where = [f"{about['cores']} cores ({about['cpu']})", *(f"{k} {v}" for k, v in about["versions"].items())]
    how = f"{record['rounds']} rounds of {record['steps']} steps, batches of {BATCH}, float32, SmolLM2-135M-Instruct"
    return "\n".join([*lines, "", f"{how}; {', '.join(where)}; commit {about['commit'][:7]}."])


def main() -> None:
    """Runs every way in a process of its own and writes the record and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print("measured:", json.dumps(measure(given.one, given.steps)))
        return
    if not given.table:
        runs = []
        for number in range(given.rounds):
            for way in given.ways.split(","):
                command = [sys.executable, __file__, "--one", way, "--steps", str(given.steps)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                found = [line for line in done.stdout.splitlines() if line.startswith("measured:")]
                if not found:
                    sys.exit(f"{way} failed:\n{done.stderr[-2000:]}")
                runs.append(json.loads(found[0].removeprefix("measured:")))
                print(f"round {number + 1}: {way} {runs[-1]['seconds']:.1f} s", flush=True)
        keep({"rounds": given.rounds, "steps": given.steps, "machine": machine(), "runs": runs}, RECORDS)
    show(table(json.loads(RECORDS.read_text(encoding="utf-8"))), __file__, PAGE)


if __name__ == "__main__":
    main()
