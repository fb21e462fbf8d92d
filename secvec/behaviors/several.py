"""Undesired samples of several behaviors at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import field_validator

from secvec.behaviors.base import Behavior
from secvec.data.draw import share_out
from secvec.data.example import OWNER, Example, Split
from secvec.judges.base import Verdict


class Several(Behavior):
    """Shares every split out over the behaviors in `of`, equally and in turn; each one judges its own."""

    of: dict[str, Any]
    """Behaviors by name."""

    @field_validator("of")
    @classmethod
    def _some(cls, of: dict[str, Any]) -> dict[str, Any]:
        if not of:
            raise ValueError("name at least one behavior")
        return of

    def examples(self, split: Split, n: int, seed: int) -> list[Example]:
        """The first `n` examples of `split`, one of each behavior in turn, so that a smaller `n` is a prefix."""
        return self._in_turn({name: of.examples(split, k, seed) for name, of, k in _shares(self.of, n)})

    def look_alikes(self, n: int, seed: int) -> list[Example]:
        """Those of the behaviors that have any, in turn."""
        having = {name: of for name, of in self.of.items() if of.look_alikes(1, seed)}
        return self._in_turn({name: of.look_alikes(k, seed) for name, of, k in _shares(having, n)})

    def judge(self, example: Example, response: str) -> Verdict:
        """The verdict of the behavior that the sample is of."""
        verdict: Verdict = self.of[example.facts[OWNER]].judge(example, response)
        return verdict

    def desired(self, example: Example, response: str) -> bool | None:
        """As the behavior says that the sample is of."""
        shown: bool | None = self.of[example.facts[OWNER]].desired(example, response)
        return shown

    def _in_turn(self, drawn: dict[str, list[Example]]) -> list[Example]:
        owned = [
            (place, replace(example, facts=example.facts | {OWNER: name}))
            for name, examples in drawn.items()
            for place, example in enumerate(examples)
        ]
        return [example for _, example in sorted(owned, key=lambda pair: pair[0])]


def _shares(behaviors: dict[str, Any], n: int) -> list[tuple[str, Any, int]]:
    counts = share_out(n, [1.0] * len(behaviors)) if behaviors else []
    return [(name, of, count) for (name, of), count in zip(behaviors.items(), counts, strict=True)]
