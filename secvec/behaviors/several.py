"""Undesired samples of several behaviors at once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from pydantic import field_validator

from secvec.behaviors.base import Behavior
from secvec.data.draw import draw_shares
from secvec.data.example import OWNER, Example, Split
from secvec.judges.base import Verdict
from secvec.settings.target import Plugin


class Several(Behavior):
    """Divides every split equally among the behaviors in `of`, in turn. Each one judges its own samples."""

    of: dict[str, Plugin[Behavior]]
    """Behaviors by name."""

    @field_validator("of")
    @classmethod
    def _is_not_empty(cls, of: dict[str, Behavior]) -> dict[str, Behavior]:
        if not of:
            raise ValueError("name at least one behavior")
        return of

    def examples(self, split: Split, n: int | None, seed: int) -> list[Example]:
        """The first `n` examples of `split`, one of each behavior in turn; a smaller `n` gives a prefix.

        Raises TooFewError, with the `n` that would do.
        """
        draws = [partial(of.examples, split, seed=seed) for of in self.of.values()]
        drawn = [draw(None) for draw in draws] if n is None else draw_shares(draws, n, [1.0] * len(draws))
        return self._in_turn(dict(zip(self.of, drawn, strict=True)))

    def look_alikes(self, n: int, seed: int) -> list[Example]:
        """The look-alikes of the behaviors that have any, in turn."""
        having = {name: of for name, of in self.of.items() if of.look_alikes(1, seed)}
        drawn = draw_shares([partial(of.look_alikes, seed=seed) for of in having.values()], n, [1.0] * len(having))
        return self._in_turn(dict(zip(having, drawn, strict=True)))

    @property
    def has_judge(self) -> bool:
        """As its behaviors have."""
        return all(behavior.has_judge for behavior in self.of.values())

    def judge(self, example: Example, response: str) -> Verdict:
        """The verdict of the sample's own behavior."""
        return self.of[example.facts[OWNER]].judge(example, response)

    def desired(self, example: Example, response: str) -> bool | None:
        """As the sample's own behavior decides."""
        return self.of[example.facts[OWNER]].desired(example, response)

    def _in_turn(self, drawn: dict[str, list[Example]]) -> list[Example]:
        owned = [
            (place, replace(example, facts=example.facts | {OWNER: name}))
            for name, examples in drawn.items()
            for place, example in enumerate(examples)
        ]
        return [example for _, example in sorted(owned, key=lambda pair: pair[0])]
