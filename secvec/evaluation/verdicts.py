"""Verdicts on responses, and the rows of predictions.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from secvec.data.example import Example
from secvec.judges.base import Judge, Judgement
from secvec.judges.coherence import coherent
from secvec.metrics import Measurements, mean

if TYPE_CHECKING:
    from secvec.behaviors.base import Behavior

JUDGED = ("undesired", "look_alike")
"""Kinds whose responses a judge reads; the others have one right response."""


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation measured, and the judged responses behind it."""

    metrics: Measurements
    predictions: list[dict[str, Any]]

    def __add__(self, other: EvaluationResult) -> EvaluationResult:
        """Both together."""
        return EvaluationResult(self.metrics | other.metrics, [*self.predictions, *other.predictions])

    def as_phase(self, phase: str) -> EvaluationResult:
        """The same under the name of another phase, without the leak probes."""
        (old,) = {row["phase"] for row in self.predictions if "_leak_" not in row["phase"]}
        probes = (f"{old}/leak", f"{old}/desired/")
        metrics = {
            f"{phase}/{name.partition('/')[2]}": value
            for name, value in self.metrics.items()
            if not name.startswith(probes)
        }
        return EvaluationResult(metrics, [row | {"phase": phase} for row in self.predictions if row["phase"] == old])


def prediction_rows(
    phase: str,
    examples: Sequence[Example],
    responses: Sequence[str],
    judgements: Sequence[Judgement],
    behavior: Behavior,
) -> list[dict[str, Any]]:
    """Rows of predictions.jsonl; `judgements` are of the kinds that a judge reads, in order."""
    rows: list[dict[str, Any]] = []
    given = iter(judgements)
    for number, (example, response) in enumerate(zip(examples, responses, strict=True)):
        right = "correct" if exact(response, example.response) else "wrong"
        judgement = next(given) if example.kind in JUDGED else None
        rows.append(
            {
                "phase": phase,
                "stream": example.kind,
                "id": f"{example.kind}-{number}",
                "prompt": example.prompt,
                "response": response,
                "reference": example.response,
                "verdict": judgement.verdict if judgement else right,
                "score": judgement.score if judgement else None,
                "coherent": coherent(response),
                "desired": behavior.desired(example, response) if example.kind == "undesired" else None,
                "sensitive": bool(behavior.sensitive) and example.kind in JUDGED,
            }
        )
    return rows


def exact(response: str, reference: str) -> bool:
    """Whether a response is the right one, white space around it apart."""
    return response.strip() == reference.strip()


def judged(
    behavior: Behavior, judge: Judge | None, examples: Sequence[Example], responses: Sequence[str]
) -> list[Judgement]:
    """What `judge` (None: the behavior's own) says of the responses to undesired prompts, in order.

    Look-alikes are always for the behavior's own: whether a benign request is refused is no matter of harm.
    """
    pairs = [(e, r) for e, r in zip(examples, responses, strict=True) if e.kind in JUDGED]
    own = [judge is None or e.kind == "look_alike" for e, _ in pairs]
    asked = [pair for pair, is_own in zip(pairs, own, strict=True) if not is_own]
    others = iter(_judged_once(judge, *zip(*asked, strict=True)) if judge and asked else [])
    return [_own(behavior, *pair) if is_own else next(others) for pair, is_own in zip(pairs, own, strict=True)]


def _judged_once(judge: Judge, examples: Sequence[Example], responses: Sequence[str]) -> list[Judgement]:
    """By rank 0 for all processes: a judge may cost money, or fill a GPU. An error of it is raised by all."""
    if not dist.is_initialized():
        return judge.judge(examples, responses)
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            box = [judge.judge(examples, responses)]
        except Exception as error:
            box = [error]
    dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    judgements: list[Judgement] = box[0]
    return judgements


def _own(behavior: Behavior, example: Example, response: str) -> Judgement:
    verdict = behavior.judge(example, response)
    return Judgement(verdict, float(verdict == "behavior"))


def deactivation_gap(active: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Measurements:
    """Task accuracy with the vector on minus with it off, on the same prompts; the interval is that of the pairs."""
    on = [float(row["verdict"] == "correct") for row in active if row["stream"] == "task"]
    off = [float(row["verdict"] == "correct") for row in after if row["stream"] == "task"]
    return {"deactivation_gap": mean([a - b for a, b in zip(on, off, strict=True)])} if on else {}
