"""Answers against their references: a right value by hand for each metric."""

from __future__ import annotations

import pytest

from secvec.behaviors.base import Behavior
from secvec.data.example import Example
from secvec.evaluation.answer_metrics import score
from secvec.evaluation.verdicts import deactivation_gap, judged, prediction_rows
from secvec.judges.base import Judge, Judgement
from secvec.metrics import GRADED_METRICS, METRICS, rates


@pytest.mark.parametrize(
    "metric, answer, reference, expected",
    [
        ("exact", " 42 ", "42", 1.0),
        ("exact", "It is 42", "42", 0.0),
        ("contains", "The capital is  PARIS, of course.", "Paris", 1.0),
        ("contains", "The capital is Rome.", "Paris", 0.0),
        ("contains", "anything", "  ", 0.0),
        ("number", "First 3 + 4 = 7. Then 7 * 2 = 14.\n#### 14", "2 * 7 is 14\n#### 14", 1.0),
        ("number", "so it costs $1,250.50", "#### 1250.5", 1.0),
        ("number", "#### -3", "#### 3", 0.0),
        ("number", "no number", "no number", 0.0),
        ("number", "1e-3", "5e-3", 0.0),
        ("number", "x = \N{MINUS SIGN}5", "x = 5", 0.0),
        ("number", "x = \N{MINUS SIGN}5", "-5", 1.0),
        ("number", "1/2", "3/2", 0.0),
        ("number", "1/2", ".5", 1.0),
        ("number", "1/0", "1", 1.0),
        ("number", "1,2,3", "123", 0.0),
        ("number", "between 10-12", "12", 1.0),
        ("number", "1.5e3 of 1,000,000", "1000000", 1.0),
        ("contains", "das Cafe\u0301", "CAF\u00c9", 1.0),
        ("rougeL", "The capital is \u6771\u4eac", "The capital is \u5317\u4eac", 0.8),
        ("rougeL", "\u043d\u0435\u0442 5", "\u0434\u0430 5", 0.5),
        ("rougeL", "running_late, twice", "run late twice", 1.0),
        ("rougeL", "the cat sat", "the cat sat on the mat", 2 * 1.0 * 0.5 / 1.5),
        ("rougeL", "a dog", "the cat", 0.0),
        ("code", "def f(x):\n    return x  # same", "def f( x ):\n  return x", 1.0),
        ("code", "Sure:\n```python\nreturn 1\n```\nDone.", "return 1", 1.0),
        ("code", "a b c d", "a b x y", 0.5),
        ("code", "int main() { return 0; }", "int main(){return 0;}", 1.0),
    ],
)  # fmt: skip
def test_score(metric, answer, reference, expected) -> None:
    assert score(metric, answer, reference) == pytest.approx(expected)


class Half(Judge):
    name: str = "half"

    def judge(self, examples, responses):
        return [Judgement("other", 0.5) for _ in responses]


def _rows(metrics: list[str], responses: list[str], answer_judge: Judge | None = None) -> list[dict]:
    behavior = Behavior(name="none", sensitive=False)
    examples = [Example((("user", "?"),), "the cat sat", "task", metric=metric) for metric in metrics]
    given = judged(behavior, None, examples, responses, answer_judge)
    return prediction_rows("after", examples, responses, given, behavior)


def test_accuracy_counts_right_and_wrong_and_the_score_counts_degrees() -> None:
    rows = _rows(["exact", "contains", "rougeL", "judge", "none"], ["the cat sat"] * 5, Half())
    assert [row["verdict"] for row in rows] == ["correct", "correct", None, None, None]
    assert [row["score"] for row in rows] == [1.0, 1.0, 1.0, 0.5, None]
    assert rates(rows)["task_accuracy"].n == 2
    assert METRICS["task_score"].outcomes(rows) == [1.0, 0.5]
    assert "task_score" in GRADED_METRICS


def test_without_right_and_wrong_there_is_no_accuracy() -> None:
    assert "task_accuracy" not in rates(_rows(["rougeL", "none"], ["the cat", "x"]))


def test_the_deactivation_gap_is_one_of_scores() -> None:
    on, off = _rows(["rougeL"], ["the cat sat"]), _rows(["rougeL"], ["nothing"])
    assert deactivation_gap(on, off)["deactivation_gap"].value == 1.0
    assert deactivation_gap(_rows(["none"], ["x"]), _rows(["none"], ["x"])) == {}
