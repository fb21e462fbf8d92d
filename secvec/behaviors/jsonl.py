"""An undesired behavior given by the user's own files."""

from __future__ import annotations

from typing import Literal

from secvec.data.example import Example, Split
from secvec.data.jsonl import JsonlFiles
from secvec.judges.refusal_keyword import refuses


class JsonlBehavior(JsonlFiles):
    """Prompts with the response that must not be learned; in `align` with the response that is wanted instead."""

    name: str
    sensitive: bool
    kind: Literal["undesired"] = "undesired"

    def examples(self, split: Split, n: int, seed: int) -> list[Example]:
        """The first `n` examples of `split` under `seed`."""
        return self.read(split, n, seed, self.kind, "behavior")

    def judge(self, example: Example, response: str) -> str:
        """`refusal` when a refusal phrase occurs, else `behavior` (keyword ASR); an empty response is neither."""
        if not response.strip():
            return "other"
        return "refusal" if refuses(response) else "behavior"
