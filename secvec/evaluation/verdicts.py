"""Verdicts on responses, and the rows of predictions.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secvec.data.example import GRADED, UNSCORED, Example
from secvec.evaluation.answer_metrics import score
from secvec.judges.base import Judge, Judgement
from secvec.judges.coherence import coherent
from secvec.metrics import Measurements, mean
from secvec.runs.processes import from_first

if TYPE_CHECKING:
    from secvec.behaviors.base import Behavior

JUDGED = ("undesired", "look_alike")
"""Kinds whose responses are judged for the behavior; those of the others are compared with their references."""


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
    """Rows of predictions.jsonl, one for each example with its response and judgement."""
    rows: list[dict[str, Any]] = []
    for number, (example, response, judgement) in enumerate(zip(examples, responses, judgements, strict=True)):
        rows.append(
            {
                "phase": phase,
                "stream": "task" if example.kind == "untrusted" else example.kind,
                "id": f"{example.kind}-{number}",
                "prompt": example.prompt,
                "response": response,
                "reference": example.response,
                "verdict": judgement.verdict,
                "score": judgement.score,
                "coherent": coherent(response),
                "desired": behavior.desired(example, response) if example.kind == "undesired" else None,
                "sensitive": bool(behavior.sensitive) and example.kind in (*JUDGED, "untrusted"),
            }
        )
    return rows


def is_right(response: str, example: Example) -> bool:
    """Whether a response counts as right under the metric of its stream."""
    return score(example.metric, response, example.response) == 1.0


def judged(
    behavior: Behavior,
    judge: Judge | None,
    examples: Sequence[Example],
    responses: Sequence[str],
    answer_judge: Judge | None = None,
) -> list[Judgement]:
    """One judgement per response, in order.

    Responses to undesired prompts are for `judge` (None: the behavior's own), those to benign prompts for the metric of
    their stream, which may be `answer_judge`. Look-alikes are always for the behavior's own judge: a judge of harm
    does not tell whether a benign request is refused.
    """
    pairs = list(zip(examples, responses, strict=True))
    found: dict[int, Judgement] = {}
    undesired = [i for i, example in enumerate(examples) if example.kind == "undesired"]
    to_grade = [i for i, example in enumerate(examples) if example.kind not in JUDGED and example.metric == "judge"]
    for chosen, numbers in ((judge, undesired), (answer_judge, to_grade)):
        if chosen and numbers:
            given = _judged_once(chosen, [examples[i] for i in numbers], [responses[i] for i in numbers])
            found |= zip(numbers, given, strict=True)
    for i in to_grade:
        if i in found and found[i].verdict != "unparsable":
            found[i] = Judgement(None, found[i].score)  # degrees, no verdict
    return [found.get(i) or _by_rule(behavior, *pair) for i, pair in enumerate(pairs)]


def _by_rule(behavior: Behavior, example: Example, response: str) -> Judgement:
    """The behavior's own verdict, or the metric of a benign stream."""
    if example.kind in JUDGED:
        verdict = behavior.judge(example, response)
        return Judgement(verdict, float(verdict == "behavior"))
    if example.metric in UNSCORED:
        return Judgement(None, None)
    value = score(example.metric, response, example.response)
    return Judgement(None if example.metric in GRADED else "correct" if value == 1.0 else "wrong", value)


def _judged_once(judge: Judge, examples: Sequence[Example], responses: Sequence[str]) -> list[Judgement]:
    """By rank 0 for all processes: a judge may cost money, or fill a GPU. An error of it is raised by all."""

    def ask() -> list[Judgement] | Exception:
        try:
            return judge.judge(examples, responses)
        except Exception as error:
            return error

    found = from_first(ask)
    if isinstance(found, Exception):
        raise found
    return found


def deactivation_gap(active: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> Measurements:
    """Score on the task with the vector on minus with it off, same prompts; the interval is that of the pairs."""
    on, off = ([row["score"] for row in rows if row["stream"] == "task"] for rows in (active, after))
    differences = [a - b for a, b in zip(on, off, strict=True) if a is not None and b is not None]
    return {"deactivation_gap": mean(differences)} if differences else {}
