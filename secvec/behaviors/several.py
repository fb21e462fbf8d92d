"""Undesired samples of several behaviors at once."""

from __future__ import annotations

from dataclasses import replace

from pydantic import field_validator

from secvec.behaviors.base import Behavior
from secvec.data.draw import share_out
from secvec.data.example import OWNER, Example, Split
from secvec.errors import TooFewError
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
        drawn, few = dict[str, list[Example]](), dict[str, TooFewError]()
        for name, of, k in _shares(self.of, n):
            try:
                drawn[name] = of.examples(split, k, seed)
            except TooFewError as error:
                few[name] = error
        if few:
            names, each = list(self.of), [1.0] * len(self.of)
            shares = ((m, dict(zip(names, share_out(m, each), strict=True))) for m in range(n or 0, -1, -1))
            fits = next(m for m, share in shares if all(share[name] <= few[name].have for name in few))
            raise TooFewError("; ".join(map(str, few.values())), fits)
        return self._in_turn(drawn)

    def look_alikes(self, n: int, seed: int) -> list[Example]:
        """The look-alikes of the behaviors that have any, in turn."""
        having = {name: of for name, of in self.of.items() if of.look_alikes(1, seed)}
        return self._in_turn({name: of.look_alikes(k or 0, seed) for name, of, k in _shares(having, n)})

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


def _shares(behaviors: dict[str, Behavior], n: int | None) -> list[tuple[str, Behavior, int | None]]:
    counts = [None] * len(behaviors) if n is None else share_out(n, [1.0] * len(behaviors)) if behaviors else []
    return [(name, of, count) for (name, of), count in zip(behaviors.items(), counts, strict=True)]
