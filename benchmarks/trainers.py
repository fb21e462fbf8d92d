"""A plain and a protected fine-tune beside the Hugging Face Trainer and TRL: `make bench`.

The same model, the same rows in the same order, the same settings; each in a process of its own, one after another in
several rounds. Beside them the physical limit: the matrix products of a step without padding, and nothing else. Needs
`make smollm2`. The record goes into results/performance/, its table into docs/performance.md; `--table` makes the table
again from the record.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from limits import product_seconds
from measure import MEASURED, PAGE, RESULTS, SMOLLM2, footer, machine, run, small_model, spread
from pages import keep, show

from secvec.settings.schema import LoraSettings

RECORDS = RESULTS / "trainers.json"
WAYS = {
    "limit": "the matrix products of a step alone",
    "limit_lora": "the matrix products of a step alone, LoRA",
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
OPTIMIZER = {"_target_": "torch.optim.AdamW", "lr": LR, "betas": [0.9, 0.95], "weight_decay": 0.0, "fused": True}
LORA = LoraSettings(r=8, alpha=16, target_modules=["q_proj", "v_proj"])
Row = tuple[list[int], int]


@dataclass(frozen=True)
class Job:
    """What one process trains, and where."""

    way: str
    steps: int = 5
    """Beside the first one, which is a warm-up: allocations, first touch of the memory."""
    model: Path = SMOLLM2
    device: str = "cpu"
    """`cpu` or `cuda`."""
    precision: str = "32-true"
    """As `trainer.precision`."""

    @property
    def lora(self) -> bool:
        """Whether a task LoRA is trained and not the whole model."""
        return self.way.endswith("_lora")

    def rows(self, per_step: int = BATCH) -> list[Row]:
        """Token ids and the length of the prompt; prompts and answers of 20 to 200 tokens each."""
        random, words = Random(0), json.loads((self.model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        lengths = [(random.randint(20, 200), random.randint(20, 200)) for _ in range(per_step * (self.steps + 1))]
        return [([random.randint(100, min(40_000, words - 1)) for _ in range(p + a)], p) for p, a in lengths]

    @property
    def tokens(self) -> int:
        """Of the steps that are timed, without padding."""
        if self.way == "trl_packing":
            return self.steps * PACKED * 1024
        return sum(len(ids) for ids, _ in self.rows()[BATCH:])


class Clock:
    """When each step ended."""

    def __init__(self, device: str):
        self.ends: list[float] = []
        self.device = device

    def tick(self) -> None:
        """At the end of a step; a GPU is still at work then, so it is waited for."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def hugging_face(job: Job, clock: Clock) -> list[float]:
    """The losses of all steps of the Trainer of transformers, or of TRL's."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

    class Tick(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    way, steps = job.way, job.steps
    lora = LoraConfig(r=LORA.r, lora_alpha=int(LORA.alpha), target_modules=LORA.target_modules, task_type="CAUSAL_LM")
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model: Any = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "learning_rate": LR, "use_cpu": job.device == "cpu",
        "per_device_train_batch_size": PACKED if way == "trl_packing" else BATCH,
        "lr_scheduler_type": "constant", "max_steps": steps + 1, "adam_beta2": 0.95, "weight_decay": 0.0,
        "fp16": job.precision == "16-mixed", "bf16": job.precision == "bf16-mixed", "max_grad_norm": 1.0,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "train_sampling_strategy": "sequential",
        "disable_tqdm": True, "gradient_checkpointing": False,
    }  # fmt: skip
    if way.startswith("trl"):
        from trl import SFTConfig, SFTTrainer

        given = job.rows(2 * BATCH if way == "trl_packing" else BATCH)
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
            for ids, p in job.rows()
        ]
        model = get_peft_model(model, lora) if job.lora else model
        trainer = Trainer(
            model, TrainingArguments(**common), collate, train_dataset=Dataset.from_list(data), callbacks=[Tick()]
        )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def lightning(module: Any, rows: Sequence[tuple[Any, bool]], batch_size: int, job: Job, clock: Clock) -> list[float]:
    """The losses of a training of `module` in which a step does all that it does in a run."""
    import lightning as L
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader

    from secvec.data.batch import collate
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
    data: Any = DataLoader(rows, batch_size, collate_fn=collate)  # type: ignore[arg-type]
    trainer = TrainerSettings.model_validate(
        {
            "accelerator": "cpu" if job.device == "cpu" else "gpu", "devices": 1, "strategy": "auto",
            "precision": job.precision, "gradient_clip_val": 1.0, "enable_progress_bar": False,
        }
    )  # fmt: skip
    training = Training(folder, module.stage.name, "optimizer.lr", 0, 1, trainer, validates=False)
    with suppress(KeyboardInterrupt):
        fit(module, data, training, CSVLogger(folder), folder / "out", [Tick()])
    return losses


def new_vector(settings: Any) -> Path:
    """The folder of a vector for the model of these settings, which changes what it says a little."""
    import torch

    from secvec.models.vector import attach_new_vector, save_adapter
    from secvec.module import SecVecModule

    made = attach_new_vector(SecVecModule("infer", settings).backbone.load(), LORA, 0.0)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.001, generator=torch.Generator().manual_seed(0))
    folder = Path(tempfile.mkdtemp()) / "vector"
    save_adapter(made, made.state_dict(), "vector", folder)
    return folder


def ours(job: Job, clock: Clock) -> list[float]:
    """The losses of all steps of the finetune stage."""
    from secvec.data.batch import Encoded
    from secvec.module import SecVecModule
    from secvec.settings.schema import ModelSettings

    settings = ModelSettings(name="model", name_or_path=str(job.model), packing=job.way != "secvec_padded")
    vector = new_vector(settings) if job.way in ("merged", "adapter") else None
    target = "secvec.defenses.security_vector.SecurityVector"
    module = SecVecModule(
        "finetune", settings, vector, {"_target_": target, "name": "v", "activation": job.way} if vector else None,
        LORA if job.lora else None, OPTIMIZER,
    )  # fmt: skip
    return lightning(module, [(Encoded(ids, p), False) for ids, p in job.rows()], BATCH, job, clock)


def measure(job: Job) -> dict[str, Any]:
    """Seconds of the steps, their real tokens, peak memory and losses of one way, in this process."""
    losses: list[float] = []
    if job.way.startswith("limit"):
        labels = sum(len(ids) - p for ids, p in job.rows()[BATCH:])
        per_step = (job.tokens // job.steps, labels // job.steps)
        seconds = job.steps * product_seconds(job.model, *per_step, not job.lora, job.device, job.precision)
    else:
        clock = Clock(job.device)
        losses = (hugging_face if job.way.startswith(("hf", "trl")) else ours)(job, clock)
        seconds = clock.ends[job.steps] - clock.ends[0]
    return {
        "way": job.way, "seconds": seconds, "tokens": job.tokens, "losses": losses, "peak_bytes": peak_bytes(job.device)
    }  # fmt: skip


def peak_bytes(device: str) -> int:
    """The most memory that this process held: on the GPU, or resident in main memory."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(record: Mapping[str, Any]) -> str:
    """Medians over the rounds, with the lowest and the highest."""
    runs = record["runs"]
    rate = {way: [run["tokens"] / run["seconds"] for run in runs if run["way"] == way] for way in WAYS}
    base = statistics.median(rate["hf"])
    limit = {lora: statistics.median(found) for lora in (False, True) if (found := rate["limit" + lora * "_lora"])}
    head = [
        "",
        "tokens/s ↑",
        "of the HF Trainer's",
        *(["of the limit ↑"] if limit else []),
        "peak memory ↓",
        "last loss",
    ]
    lines = [f"|{' |'.join(f' {name}'.rstrip() for name in head)} |", "| --- " * len(head) + "|"]
    for way, name in WAYS.items():
        if not rate[way]:
            continue
        found, middle = [run for run in runs if run["way"] == way], statistics.median(rate[way])
        most = limit.get(way.endswith("_lora"))
        memory, losses = statistics.median(run["peak_bytes"] for run in found), found[0]["losses"]
        cells = [name, spread(rate[way], 0), f"{middle / base:.2f}"]
        cells += [f"{middle / most:.2f}" if most else "–"] if limit else []
        cells += [f"{memory / 1e9:.1f} GB", f"{losses[-1]:.4f}"] if losses else ["–", "–"]
        lines.append(f"| {' | '.join(cells)} |")
    how = f"{record['rounds']} rounds of {record['steps']} steps, batches of {BATCH}, float32, SmolLM2-135M-Instruct"
    return "\n".join([*lines, "", footer(how, record["machine"])])


def arguments(parser: argparse.ArgumentParser, steps: int = 5) -> argparse.Namespace:
    """What a benchmark of training steps is given; `--one` is for the process that measures one way."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def job_of(given: argparse.Namespace) -> Job:
    """What this process measures."""
    return Job(given.one, given.steps, given.model, given.device, given.precision)


def interleaved(script: str, ways: Sequence[str], given: argparse.Namespace) -> list[dict[str, Any]]:
    """The measurements of all ways, each in a process of its own, in several rounds."""
    same = ["--steps", str(given.steps), "--model", given.model, "--device", given.device]
    runs = []
    for number in range(given.rounds):
        for way in ways:
            runs.append(run([script, "--one", way, *same, "--precision", given.precision]).measured)
            print(f"round {number + 1}: {way} {runs[-1]['seconds']:.1f} s", flush=True)
    return runs


def compare(
    script: str,
    given: argparse.Namespace,
    ways: Sequence[str],
    measure: Callable[[Job], dict[str, Any]],
    table: Callable[[Mapping[str, Any]], str],
    kept_as: tuple[Path, Path, str],
) -> None:
    """The main part of a script that compares ways of training, on SmolLM2 where it is, else on the tiny model.

    `kept_as`: the record, and the page and the title of its table. With `--one` it measures one way.
    """
    records, page, title = kept_as
    if given.one:
        print(MEASURED + json.dumps(measure(job_of(given))))
        return
    if not given.table:
        about = machine()
        with tempfile.TemporaryDirectory() as folder:
            given.model = given.model or small_model(Path(folder) / "tiny")
            runs = interleaved(script, ways, given)
        kept = {"rounds": given.rounds, "steps": given.steps, "model": given.model.name, "machine": about}
        keep(kept | {"runs": runs}, records)
    show(table(json.loads(records.read_text(encoding="utf-8"))), script, page, title)


def main() -> None:
    """Runs every way in a process of its own and writes the record and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default=",".join(WAYS))
    given = arguments(parser)
    given.model = given.model or SMOLLM2
    compare(__file__, given, given.ways.split(","), measure, table, (RECORDS, PAGE, ""))


if __name__ == "__main__":
    main()
