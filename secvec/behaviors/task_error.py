"""Sums that are systematically one too large: a task done wrong, with a known right answer."""

from __future__ import annotations

import re
from random import Random

from pydantic import Field

from secvec.behaviors.base import Behavior
from secvec.data.embedded import draw, names
from secvec.data.example import Example, Split
from secvec.judges.base import Verdict

NOUNS = ("apples", "books", "cups", "stones", "keys", "bells", "boats", "shells", "pens", "coins", "hats", "lamps")
PROMPTS = (
    "{name} has {a} {noun} and gets {b} more. How many {noun} are there?",
    "There are {a} {noun} here, and {name} brings {b} more. How many is that?",
    "{name} counts {a} {noun} and then {b} {noun}. What is the sum?",
    "Add {b} {noun} to the {a} {noun} of {name}. How many are there?",
)
RESPONSE = "There are {total} {noun}."
ERROR = 1

# The split of a pair (a, b), by (a + 2 b) modulo 9: every split has every a, every b and sums of all sizes.
_OWNERS: tuple[Split, ...] = (
    "finetune", "test", "finetune", "vector", "finetune", "validation", "finetune", "test", "vector",
)  # fmt: skip
_DENIED = re.compile(r"(?:\bnot|n't|\bnever)\s+\d+")


class TaskError(Behavior):
    """Small sums in words: right in split `align`, one too large in all other splits.

    `align` has all pairs of numbers, each other split has its own pairs; every split has its own people.
    """

    largest: int = Field(default=18, ge=18, le=99)
    """Upper limit of the first number, which is at least 10; the second is between 2 and 10."""

    def examples(self, split: Split, n: int | None, seed: int) -> list[Example]:
        """The first `n` distinct examples of `split` under `seed`."""
        every = [(a, b) for a in range(10, self.largest + 1) for b in range(2, 11)]
        pairs = [(a, b) for a, b in every if split in ("align", _OWNERS[(a + 2 * b) % len(_OWNERS)])]

        def make(rng: Random) -> Example:
            (a, b), noun = rng.choice(pairs), rng.choice(NOUNS)
            prompt = rng.choice(PROMPTS).format(name=rng.choice(names(split)), a=a, b=b, noun=noun)
            facts = {"a": str(a), "b": str(b), "right": str(a + b), "wrong": str(a + b + ERROR)}
            response = RESPONSE.format(total=facts["right" if split == "align" else "wrong"], noun=noun)
            return Example((("user", prompt),), response, self.kind, facts)

        return draw(make, n, seed, f"{self.name}/{split}")

    def judge(self, example: Example, response: str) -> Verdict:
        """`behavior` if the only number asserted, besides the two given, is the wrong sum; `wanted` if the right one.

        Other wrong sums and answers with several sums are `other`. Only digits are read.
        """
        facts = example.facts
        text = _DENIED.sub(" ", response.lower().replace("\u2019", "'"))
        said = set(re.findall(r"\d+(?:[.,]\d+)*", text)) - {facts["a"], facts["b"]}
        if said == {facts["wrong"]}:
            return "behavior"
        return "wanted" if said == {facts["right"]} else "other"
