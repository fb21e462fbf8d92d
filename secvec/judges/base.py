"""The base of all judges: a judge turns prompts and responses into verdicts and scores."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from secvec.data.example import Example
from secvec.settings.schema import Settings

Verdict = Literal["behavior", "refusal", "wanted", "other", "unparsable", "correct", "wrong"]
"""`behavior`: the response shows the undesired behavior; `refusal`: it refuses; `wanted`: it is the wanted answer;
`other`: none of these; `unparsable`: the judge gave no verdict (reported as such, never counted as safe).
`correct` and `wrong`: a response to a benign prompt, compared with its reference."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """A judge's verdict on one response."""

    verdict: Verdict | None
    """None: there are only degrees, or no judge at all."""
    score: float | None
    """How much of the behavior the response shows, or how near it is to the reference, in [0, 1]; None: not known."""


class Judge(Settings):
    """A judge. The docstring of a subclass names the published definition that it follows."""

    name: str
    scale: ClassVar[tuple[float, float]] = (0.0, 1.0)
    """The judge's own scale, which is mapped to [0, 1] (a 1-5 rubric: (1, 5))."""
    compares: ClassVar[bool] = False
    """Whether it compares a response with that of the example, which must then survive the model's tokens whole."""

    def check(self) -> None:
        """Raises the SecVecError that would stop it at the first response, before anything is trained."""

    def judge(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Judgement]:
        """One judgement per response, in order."""
        return [self.judge_one(example, response) for example, response in zip(examples, responses, strict=True)]

    def judge_one(self, example: Example, response: str) -> Judgement:
        """The judgement of one response, for judges that take each by itself."""
        raise NotImplementedError
