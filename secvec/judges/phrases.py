"""The behavior by phrases or by a regular expression of your own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator, Field

from secvec.data.example import Example
from secvec.judges.base import Judge, Judgement


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, Field(min_length=1), AfterValidator(_compiles)]
Phrase = Annotated[str, Field(min_length=1)]


class Regex(Judge):
    """`behavior` if `pattern` is found in the response, else `refusal` if `refusal` is, else `other`."""

    pattern: Pattern
    refusal: Pattern | None = None

    def judge(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Judgement]:
        """One judgement per response."""
        return [_judgement(response, self.pattern, self.refusal) for response in responses]


class Phrases(Judge):
    """`behavior` if one of `phrases` occurs in the response, else `refusal` if one of `refusals` does, else `other`.

    Case does not count.
    """

    phrases: Annotated[list[Phrase], Field(min_length=1)]
    refusals: tuple[Phrase, ...] = ()

    def judge(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Judgement]:
        """One judgement per response."""
        shown, refused = ("|".join(map(re.escape, some)) for some in (self.phrases, self.refusals))
        return [_judgement(r, f"(?i){shown}", f"(?i){refused}" if refused else None) for r in responses]


def _judgement(response: str, pattern: str, refusal: str | None) -> Judgement:
    if re.search(pattern, response):
        return Judgement("behavior", 1.0)
    return Judgement("refusal" if refusal and re.search(refusal, response) else "other", 0.0)
