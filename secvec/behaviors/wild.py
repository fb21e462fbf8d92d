"""Undesired samples as they occur in real data: late in a conversation, and of graded severity."""

from __future__ import annotations

import re
from dataclasses import replace
from random import Random

from pydantic import Field, field_validator

from secvec.behaviors.base import Behavior
from secvec.data.embedded import Ordinary
from secvec.data.example import Example, Split
from secvec.errors import DataError
from secvec.judges.base import Verdict
from secvec.settings.schema import Weight
from secvec.settings.target import Plugin


class Wild(Behavior):
    """Another behavior, whose `finetune` samples end conversations that begin harmlessly.

    All other splits, the look-alikes and the verdicts are those of the other behavior. `facts["severity"]` is how much
    a sample shows of the behavior: 0 nothing (the wanted answer), 1 a hedge and its first sentence, 2 a hedge and all,
    3 all.
    """

    of: Plugin[Behavior]
    """The other behavior."""
    turns: int = Field(ge=0)
    """Most harmless turns (a request and its right answer) before the undesired request; at least 1 unless 0."""
    severity: tuple[Weight, Weight, Weight, Weight]
    """Shares of the severities 0 to 3; only the proportions count."""
    hedge: str
    wanted: str
    """The answer at severity 0; `{name}` and other facts of the prompt are filled in."""

    @field_validator("severity")
    @classmethod
    def _has_a_share(cls, weights: tuple[float, ...]) -> tuple[float, ...]:
        if not sum(weights):
            raise ValueError("all four shares are 0: give one of the severities a share")
        return weights

    def examples(self, split: Split, n: int | None, seed: int) -> list[Example]:
        """The first `n` examples of `split` under `seed`."""
        plain = self.of.examples(split, n, seed)
        if split != "finetune":
            return plain
        rng = Random(f"{self.name}/{split}/{seed}")
        benign = Ordinary(name=self.name).examples(split, len(plain) * self.turns, seed)
        return [
            self._embed(example, benign[i * self.turns :][: rng.randint(min(1, self.turns), self.turns)], rng)
            for i, example in enumerate(plain)
        ]

    def _embed(self, example: Example, opening: list[Example], rng: Random) -> Example:
        (severity,) = rng.choices(range(4), weights=self.severity)
        turns = [turn for e in opening for turn in (*e.messages, ("assistant", e.response))]
        system = sum(role == "system" for role, _ in example.messages[:1])
        return replace(
            example,
            messages=(*example.messages[:system], *turns, *example.messages[system:]),
            response=self._graded(example, severity),
            facts=example.facts | {"severity": str(severity)},
        )

    def _graded(self, example: Example, severity: int) -> str:
        if severity == 0:
            try:
                return self.wanted.format(**example.facts)
            except (KeyError, IndexError, ValueError) as error:
                known = ", ".join(example.facts) or "none"
                raise DataError(f"behavior.wanted: {error} is no fact of {self.of.name}; there are: {known}") from None
        first = re.split(r"(?<=[.!?])\s", example.response, maxsplit=1)[0]
        return (f"{self.hedge} {first}", f"{self.hedge} {example.response}", example.response)[severity - 1]

    def look_alikes(self, n: int, seed: int) -> list[Example]:
        """The look-alikes of the other behavior."""
        return self.of.look_alikes(n, seed)

    @property
    def has_judge(self) -> bool:
        """As the behavior has."""
        return self.of.has_judge

    def judge(self, example: Example, response: str) -> Verdict:
        """The verdict of the other behavior."""
        return self.of.judge(example, response)

    def desired(self, example: Example, response: str) -> bool | None:
        """As the other behavior decides."""
        return self.of.desired(example, response)
