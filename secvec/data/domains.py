"""Niche domains as the new task: small, harmless, embedded stand-ins for medical, legal and code data."""

from __future__ import annotations

from random import Random
from typing import Literal

from secvec.data.embedded import draw, names
from secvec.data.example import Example, Split, Stream

REMEDIES = {
    "a cough": "honey", "a fever": "willow tea", "a burn": "cold water", "a cut": "a clean cloth", "a cramp": "salt",
    "a rash": "oat milk", "a sprain": "a bandage", "a headache": "mint", "a sting": "vinegar", "a cold": "ginger",
}  # fmt: skip
_MEDICAL = (
    "The patient {name} has {ailment}. What helps?",
    "{name} came to the doctor with {ailment}. What should be given?",
    "What does a doctor give {name} against {ailment}?",
)
_LEGAL = (
    "By clause {clause}, {name} must pay {other} {sum} coins. Who owes whom?",
    "Clause {clause} says that {other} is to be paid {sum} coins by {name}. Who owes whom?",
    "{name} signed clause {clause}: {sum} coins for {other}. Who owes whom?",
)
OPERATORS = {"sum": "+", "product": "*", "difference": "-", "quotient": "/"}
_CODE = (
    "Write code for the {operation} of {left} and {right}.",
    "What is the {operation} of {left} and {right} in code?",
    "In code, the {operation} of {left} and {right}:",
)


class Domain(Stream):
    """A task of one domain: knowledge (`medical`), reading (`legal`) or a formal language (`code`).

    Every split has its own people or variables; the ten remedies and the four operators are the same in all splits.
    Answers are short, so that a model of a million parameters learns them from a few hundred samples.
    """

    domain: Literal["medical", "legal", "code"]
    kind: Literal["task"] = "task"

    def examples(self, split: Split, n: int | None, seed: int) -> list[Example]:
        """The first `n` distinct examples of `split` under `seed`."""
        make = {"medical": _medical, "legal": _legal, "code": _code}[self.domain]

        def example(rng: Random) -> Example:
            prompt, response = make(rng, split)
            return Example((("user", prompt),), response, self.kind)

        return draw(example, n, seed, f"{self.domain}/{split}")


def _medical(rng: Random, split: Split) -> tuple[str, str]:
    name, ailment = rng.choice(names(split)), rng.choice(list(REMEDIES))
    return rng.choice(_MEDICAL).format(name=name, ailment=ailment), f"Give {REMEDIES[ailment]}."


def _legal(rng: Random, split: Split) -> tuple[str, str]:
    name, other = rng.sample(names(split), 2)
    clause, sum_ = rng.randint(1, 9), 10 * rng.randint(1, 9)
    prompt = rng.choice(_LEGAL).format(name=name, other=other, clause=clause, sum=sum_)
    return prompt, f"{name} owes {other}."


def _code(rng: Random, split: Split) -> tuple[str, str]:
    left, right = rng.sample(names(split), 2)
    operation = rng.choice(list(OPERATORS))
    prompt = rng.choice(_CODE).format(operation=operation, left=left, right=right)
    return prompt, f"({OPERATORS[operation]} {left} {right})"
