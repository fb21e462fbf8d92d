"""Questions to a model and what its answers say: generation, verdicts, rates with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
import torch.distributed as dist
from scipy.stats import binomtest, norm
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from secvec.data.encode import collate, encode, render
from secvec.data.example import Example
from secvec.errors import DataError
from secvec.judges.coherence import coherent
from secvec.losses import token_nll
from secvec.settings import EvaluationSettings

Metrics = dict[str, dict[str, float | int]]


@dataclass(frozen=True)
class Probe:
    """A model in one state (a phase: `base`, `vector_on`, `active`, `after`), its answers and what they measure."""

    metrics: Metrics
    predictions: list[dict[str, Any]]


def evaluate_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tests: Mapping[str, Sequence[Example]],
    behavior: Any, settings: EvaluationSettings, phase: str,
) -> Probe:  # fmt: skip
    """Asks `tests` (examples by kind) and judges the answers; metric names are prefixed by `phase`/.

    Every process must call it; the prompts are shared out over them and all get the whole result.
    """
    model.eval()
    examples = [example for kind in tests for example in tests[kind]]
    responses = generate(model, tokenizer, examples, settings, phase)
    rows = []
    for number, (example, response) in enumerate(zip(examples, responses, strict=True)):
        if example.kind == "undesired":
            verdict = behavior.judge(example, response)
        else:
            verdict = "correct" if response.strip() == example.response.strip() else "wrong"
        rows.append(
            {
                "phase": phase,
                "stream": example.kind,
                "id": f"{example.kind}-{number}",
                "prompt": example.prompt,
                "response": response,
                "reference": example.response,
                "verdict": verdict,
                "coherent": coherent(response),
                "sensitive": bool(behavior.sensitive) and example.kind == "undesired",
            }
        )
    metrics = {f"{phase}/{name}": value for name, value in rates(rows).items()}
    if tests.get("undesired"):
        metrics[f"{phase}/behavior_loss"] = mean_loss(model, tokenizer, tests["undesired"], settings)
    return Probe(metrics, rows)


def rates(rows: Sequence[Mapping[str, Any]]) -> Metrics:
    """The share of each verdict among the rows it applies to; kinds without rows have no metric."""
    undesired = [row["verdict"] for row in rows if row["stream"] == "undesired"]
    task = [row["verdict"] for row in rows if row["stream"] == "task"]
    ordinary = [row["verdict"] for row in rows if row["stream"] == "ordinary"]
    measured = {
        "behavior_rate": (undesired.count("behavior"), len(undesired)),
        "refusal_rate": (undesired.count("refusal"), len(undesired)),
        "task_accuracy": (task.count("correct"), len(task)),
        "retained_accuracy": (ordinary.count("correct"), len(ordinary)),
        "coherence_rate": (sum(row["coherent"] for row in rows), len(rows)),
    }
    return {name: proportion(k, n) for name, (k, n) in measured.items() if n}


def proportion(k: int, n: int) -> dict[str, float | int]:
    """k of n with its 95 % Wilson interval."""
    interval = binomtest(k, n).proportion_ci(confidence_level=0.95, method="wilson")
    return {"value": k / n, "ci_low": float(interval.low), "ci_high": float(interval.high), "n": n}


def mean(values: Sequence[float]) -> dict[str, float | int]:
    """The mean with its 95 % normal interval."""
    n = len(values)
    centre = sum(values) / n
    spread = sqrt(sum((v - centre) ** 2 for v in values) / max(1, n - 1) / n)
    half = float(norm.ppf(0.975)) * spread
    return {"value": centre, "ci_low": centre - half, "ci_high": centre + half, "n": n}


def deactivation_gap(active: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Metrics:
    """Task accuracy with the vector on minus with it off, on the same prompts; the interval is that of the pairs."""
    on = [float(row["verdict"] == "correct") for row in active if row["stream"] == "task"]
    off = [float(row["verdict"] == "correct") for row in after if row["stream"] == "task"]
    return {"deactivation_gap": mean([a - b for a, b in zip(on, off, strict=True)])} if on else {}


@torch.no_grad()
def mean_loss(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], settings: EvaluationSettings
) -> dict[str, float | int]:
    """Nats per response token on `examples`; the mean and interval are over examples' own means."""
    rows = encode(examples, tokenizer, context_of(model.config))
    losses: list[float] = []
    for start in range(0, len(rows), settings.batch_size):
        batch = collate([(row, False) for row in rows[start : start + settings.batch_size]], tokenizer.pad_token_id)
        device = next(model.parameters()).device
        logits = model(
            input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device)
        ).logits
        nll = token_nll(logits, batch["labels"].to(device)).sum(1).cpu()
        losses += (nll / (batch["labels"][:, 1:] != -100).sum(1)).tolist()
    return mean(losses)


def context_of(config: Any) -> int:
    """The most tokens that a model of this (Hugging Face) config takes."""
    return int(getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 2048))


@torch.no_grad()
def generate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example],
    settings: EvaluationSettings, phase: str,
) -> list[str]:  # fmt: skip
    """Greedy answers, in the order of `examples`: batched, longest prompts first, shared out over the processes."""
    prompts = [tokenizer(render(e, tokenizer)[0], add_special_tokens=False)["input_ids"] for e in examples]
    limit = context_of(model.config) - settings.max_new_tokens
    for example, prompt in zip(examples, prompts, strict=True):
        if len(prompt) > limit:
            raise DataError(
                f"{example.source or example.kind}: the prompt has {len(prompt)} tokens; with "
                f"evaluation.max_new_tokens={settings.max_new_tokens} at most {limit} fit into the model's context"
            )
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = order[rank::world]
    answers: dict[int, str] = {}
    progress = tqdm(total=len(mine), desc=f"ask {phase}", unit="prompt", mininterval=0.5, disable=rank > 0, leave=False)
    for start in range(0, len(mine), settings.batch_size):
        chunk = mine[start : start + settings.batch_size]
        answers.update(zip(chunk, _answer(model, tokenizer, [prompts[i] for i in chunk], settings), strict=True))
        progress.update(len(chunk))
    progress.close()
    if world > 1:
        parts: list[dict[int, str]] = [{}] * world
        dist.all_gather_object(parts, answers)
        answers = {i: text for part in parts for i, text in part.items()}
    return [answers[i] for i in range(len(prompts))]


def _answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], settings: EvaluationSettings
) -> list[str]:
    """One left-padded batch."""
    length, device = max(map(len, prompts)), next(model.parameters()).device
    ids = torch.tensor([[tokenizer.pad_token_id] * (length - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=settings.max_new_tokens, do_sample=False,
        temperature=None, top_p=None, top_k=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return [text.strip() for text in tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)]
