"""An undesired behavior from the user's own files."""

from __future__ import annotations

from pydantic import FilePath

from secvec.behaviors.base import Behavior
from secvec.data.example import Example, Split
from secvec.data.jsonl import JsonlFiles, sample

HOLD_OUT_EVERY = 5


class JsonlBehavior(JsonlFiles, Behavior):
    """Prompts with the response that must not be learned; in `align`, with the wanted one.

    Nobody but the user knows what shows the behavior: it has no judge of its own.
    """

    validation: FilePath | None = None
    """File for the gate; None: every fifth row of `vector` is held out for it."""

    def examples(self, split: Split, n: int, seed: int) -> list[Example]:
        """The first `n` examples of `split` under `seed`."""
        if n == 0:
            return []
        if self.validation is not None or split not in ("vector", "validation"):
            return sample(self.rows(split, self.kind, "behavior"), n, seed, split, getattr(self, split))
        rows = self.rows("vector", self.kind, "behavior")
        held_out = split == "validation"
        chosen = [row for i, row in enumerate(rows) if (i % HOLD_OUT_EVERY == 0) == held_out]
        assert self.vector is not None
        return sample(chosen, n, seed, split, self.vector, " (every fifth row is held out for validation)")
