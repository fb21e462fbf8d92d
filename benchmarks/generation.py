"""Answers to an evaluation's prompts beside a plain `model.generate` loop and lm-evaluation-harness.

    python benchmarks/generation.py [--rounds 3] [--prompts 32] [--new-tokens 48] [--batch 16]

The same prompts of the embedded data, greedy, with the same limit and the same stops, on SmolLM2 where `make smollm2`
has put it, else on the tiny model. The plain loop takes the prompts in the order of an evaluation, left-padded. The
backend of lm-eval (`HFLM.generate_until`) is left out where it is not installed. Loading the model is not timed. The
record goes into results/performance/, its table into docs/performance.md; `--table` makes the table again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from measure import MEASURED, PAGE, RESULTS, footer, machine, run, small_model, spread
from pages import keep, show
from trainers import peak_bytes

RECORDS = RESULTS / "generation.json"
TITLE = "Answers beside `model.generate` and lm-eval"
WAYS = {"plain": "`model.generate` in a loop", "lm_eval": "lm-eval, `HFLM`", "vllm": "secvec, vLLM", "secvec": "secvec"}


def examples(n: int) -> list[Any]:
    """`n` test prompts of the embedded behaviors and benign streams, kind after kind as an evaluation asks them."""
    from secvec.data.embedded import Ordinary, Skill

    return [*Ordinary().examples("test", n // 2, 0), *Skill().examples("test", n - n // 2, 0)]


def plain(model: Any, texts: list[str], tokenizer: Any, given: argparse.Namespace) -> list[str]:
    """The loop that people write: padded batches in the given order."""
    import torch

    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    answers: list[str] = []
    for start in range(0, len(texts), given.batch):
        batch = tokenizer(
            texts[start : start + given.batch], padding=True, add_special_tokens=False, return_tensors="pt"
        )
        with torch.no_grad():
            out = model.generate(
                input_ids=batch["input_ids"].to(given.device), attention_mask=batch["attention_mask"].to(given.device),
                max_new_tokens=given.new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
        answers += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def lm_eval(model: Any, texts: list[str], tokenizer: Any, given: argparse.Namespace) -> list[str]:
    """The same by the backend of lm-evaluation-harness."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=given.batch, add_bos_token=False)
    limits = {"until": [tokenizer.eos_token], "max_gen_toks": given.new_tokens, "do_sample": False}
    asked = [Instance("generate_until", {}, (text, dict(limits)), number) for number, text in enumerate(texts)]
    found: list[str] = harness.generate_until(asked, disable_tqdm=True)
    return found


def secvec(module: Any, way: str, question: Any, given: argparse.Namespace) -> list[str]:
    """The same by our evaluation."""
    from secvec.evaluation.generation import generation_backend
    from secvec.evaluation.prediction import respond
    from secvec.settings.schema import EvaluationSettings, GenerationSettings
    from secvec.settings.trainer import TrainerSettings

    hardware = {"accelerator": "cpu" if given.device == "cpu" else "gpu", "devices": 1, "strategy": "auto"}
    trainer = TrainerSettings.model_validate({**hardware, "precision": "32-true", "gradient_clip_val": None})
    if way == "vllm":
        engine = {"name": "vllm", "dtype": "bfloat16", "tensor_parallel_size": 1, "gpu_memory_utilization": 0.9}
        settings = GenerationSettings.model_validate(engine)
        module.generation = generation_backend(module.backbone, None, settings, trainer, None)
    asked = EvaluationSettings(
        num_prompts=given.prompts, batch_size=given.batch, max_new_tokens=given.new_tokens, num_leak_prompts=0
    )
    return respond(module, [question], asked, trainer, "answers")[0]


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds, answers and peak memory of one way, in this process."""
    import torch
    from transformers import AutoModelForCausalLM

    from secvec.data.prompts import prompt_set
    from secvec.module import SecVecModule

    module = SecVecModule("infer", given.model)
    tokenizer = module.backbone.tokenizer
    asked = prompt_set(examples(given.prompts), tokenizer)
    if given.one in ("secvec", "vllm"):
        module.configure_model()
        module.model.to(given.device)
        start = time.perf_counter()
        answers = secvec(module, given.one, asked, given)
    else:
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).to(given.device).eval()
        start = time.perf_counter()
        answers = {"plain": plain, "lm_eval": lm_eval}[given.one](model, list(asked.texts), tokenizer, given)
    seconds = time.perf_counter() - start
    answers = [answer.strip() for answer in answers]
    return {"way": given.one, "seconds": seconds, "answers": answers, "peak_bytes": peak_bytes(given.device)}


def ways(device: str) -> list[str]:
    """Those that can run here."""
    can = {"lm_eval": find_spec("lm_eval") is not None, "vllm": device == "cuda" and find_spec("vllm") is not None}
    return [way for way in WAYS if can.get(way, True)]


def table(record: Mapping[str, Any]) -> str:
    """Medians over the rounds, with the lowest and the highest."""
    runs, prompts = record["runs"], record["prompts"]
    lines = ["| | prompts/s ↑ | of the loop's | peak memory ↓ | answers as the loop's |", "| --- " * 5 + "|"]
    rate = {way: [prompts / run["seconds"] for run in runs if run["way"] == way] for way in WAYS}
    first = next(run["answers"] for run in runs if run["way"] == "plain")
    for way, name in WAYS.items():
        if not rate[way]:
            continue
        found = [run for run in runs if run["way"] == way]
        memory = statistics.median(run["peak_bytes"] for run in found)
        same = sum(a == b for a, b in zip(found[0]["answers"], first, strict=True))
        ratio = statistics.median(rate[way]) / statistics.median(rate["plain"])
        lines.append(f"| {name} | {spread(rate[way], 2)} | {ratio:.2f} | {memory / 1e9:.1f} GB | {same} of {prompts} |")
    how = (
        f"{record['rounds']} rounds of {prompts} prompts, batches of {record['batch']}, at most {record['new_tokens']}"
    )
    return "\n".join([*lines, "", footer(f"{how} new tokens, float32, {record['model']}", record["machine"])])


def main() -> None:
    """Runs all ways in processes of their own and writes the record and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("--rounds", 3), ("--prompts", 32), ("--new-tokens", 48), ("--batch", 16)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print("\n" + MEASURED + json.dumps(measure(given)))
        return
    if not given.table:
        about, runs = machine(), []
        same = {"prompts": given.prompts, "new_tokens": given.new_tokens, "batch": given.batch}
        arguments = [part for name, n in same.items() for part in (f"--{name.replace('_', '-')}", str(n))]
        with tempfile.TemporaryDirectory() as folder:
            given.model = given.model or small_model(Path(folder) / "tiny")
            arguments += ["--device", given.device, "--model", given.model]
            for number in range(given.rounds):
                for way in ways(given.device):
                    runs.append(run([__file__, "--one", way, *arguments]).measured)
                    print(f"round {number + 1}: {way} {runs[-1]['seconds']:.1f} s", flush=True)
        kept = {"rounds": given.rounds, **same, "model": given.model.name, "machine": about, "runs": runs}
        keep(kept, RECORDS)
    show(table(json.loads(RECORDS.read_text(encoding="utf-8"))), __file__, PAGE, TITLE)


if __name__ == "__main__":
    main()
