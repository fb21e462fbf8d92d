"""No judge: for behaviors that nobody can tell from an answer. The losses are measured all the same."""

from __future__ import annotations

from secvec.data.example import Example
from secvec.judges.base import Judge, Judgement


class NoJudge(Judge):
    """No verdict on any response: there is no behavior rate, and the gate of the vector looks at the loss alone."""

    def judge_one(self, example: Example, response: str) -> Judgement:
        """An empty judgement."""
        return Judgement(None, None)
