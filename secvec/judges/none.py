"""No judge: for behaviors that nobody can tell from an answer. The losses are measured all the same."""

from __future__ import annotations

from collections.abc import Sequence

from secvec.data.example import Example
from secvec.judges.base import Judge, Judgement


class NoJudge(Judge):
    """No verdict on any response: there is no behavior rate, and the gate of the vector looks at the loss alone."""

    def judge(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Judgement]:
        """Empty judgements."""
        return [Judgement(None, None)] * len(responses)
