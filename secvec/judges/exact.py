"""Exact match with the text that shows the behavior: for behaviors with a single answer."""

from typing import ClassVar

from secvec.data.example import Example, same_text
from secvec.judges.base import Judge, Judgement


def normalised(text: str) -> str:
    """Without case, runs of white space and final punctuation."""
    return same_text(text).rstrip(".!?,;: ")


class Exact(Judge):
    """`behavior` if the response equals the example's response, which shows the behavior; else `other`.

    Case, white space and final punctuation do not count.
    """

    compares: ClassVar[bool] = True

    def judge_one(self, example: Example, response: str) -> Judgement:
        """By the response and that of the example."""
        given = normalised(response)
        shown = bool(given) and given == normalised(example.response)
        return Judgement("behavior", 1.0) if shown else Judgement("other", 0.0)
