"""What every judge is: prompts and responses in, verdicts and scores out. A judge is one file and one yaml."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from secvec.data.example import Example
from secvec.settings.schema import Settings

Verdict = Literal["behavior", "refusal", "wanted", "other", "unparsable"]
"""`behavior`: the undesired behavior is shown; `refusal`: the request is refused; `wanted`: it is answered as it should
be; `other`: none of these; `unparsable`: the judge gave no verdict (reported as such, never counted as safe)."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge says of one response."""

    verdict: Verdict
    score: float | None
    """How much of the behavior it shows, in [0, 1]; None when the judge gave no verdict."""


class Judge(Settings):
    """Base of all judges; a subclass says in its docstring which published definition it follows."""

    name: str
    scale: ClassVar[tuple[float, float]] = (0.0, 1.0)
    """The judge's own scale, which scores are mapped from (a 1-5 rubric: (1, 5))."""

    def judge(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Judgement]:
        """One judgement per response, in order."""
        raise NotImplementedError
