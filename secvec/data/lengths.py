"""Samples that exceed the model's context: refused, left out or cut, before anything is trained."""

from __future__ import annotations

import logging
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from secvec.data.batch import Encoded
from secvec.data.example import Example
from secvec.errors import DataError, first_few

log = logging.getLogger(__name__)


@dataclass
class Fitting:
    """Makes samples fit into a context of `context` tokens, as `policy` says, and counts what it did.

    `encode` gives the tokens of samples for a context, and raises DataError for one that exceeds it. `truncate` cuts an
    answer at its end, and the model is not taught to end there. A prompt is never cut: without its end or its beginning
    it asks something else. So a sample whose prompt leaves no room is left out. A reference for responses is not cut
    either: another response would then be right.
    """

    encode: Callable[[Sequence[Example], int], Sequence[Encoded]]
    context: int
    policy: Literal["error", "drop", "truncate"]
    faults: list[str] = field(default_factory=list)
    left_out: int = 0
    cut: int = 0
    rooms: list[int] = field(default_factory=list)
    """Tokens that are left for an answer, of samples that would fit with a shorter one."""

    def fit(self, examples: list[Example], room: int = 0) -> list[Example]:
        """`examples` that fit; `room` tokens are left after the prompts of those that the model is to answer."""
        try:
            rows = self.encode(examples, self.context)
        except DataError:
            rows = self.encode(examples, sys.maxsize)  # raises it again if it is not of length
        return [kept for pair in zip(examples, rows, strict=True) if (kept := self._one(*pair, room))]

    def _one(self, example: Example, row: Encoded, room: int) -> Example | None:
        room = room and (example.max_new_tokens or room)
        asks, total = row.num_prompt + max(1, room), len(row.input_ids)
        if max(asks, total) <= self.context:
            return example
        answer = f" and evaluation.max_new_tokens={room}" if room else ""
        prompt = f", the prompt {row.num_prompt}{answer}" if asks > self.context else ""
        self.faults.append(f"{example.source or example.kind}: {total} tokens{prompt}")
        if total <= self.context:
            self.rooms.append(self.context - row.num_prompt)
        compared = room and example.kind not in ("undesired", "look_alike") and example.metric != "none"
        if self.policy == "truncate" and asks <= self.context and not compared:
            # encoded again for each guess: tokens of a shorter text are not always the first of a longer one
            too_long = range(len(example.response))
            length = bisect_left(too_long, True, key=lambda n: not self._fits(self._cut(example, n + 1)))
            if self._cut(example, length).response.strip():
                self.cut += 1
                return self._cut(example, length)
        self.left_out += 1
        return None

    def _fits(self, example: Example) -> bool:
        return not example.response.strip() or len(self.encode([example], sys.maxsize)[0].input_ids) <= self.context

    def _room(self) -> int:
        """The tokens of an answer with which all samples fit; 0 where there are none."""
        return min(self.rooms) if len(self.rooms) == len(self.faults) else 0

    @staticmethod
    def _cut(example: Example, length: int) -> Example:
        return replace(example, response=example.response[:length], cut=True)

    def check(self) -> None:
        """Says what was done. Raises DataError for samples that are too long under `error`."""
        if self.policy == "error" and self.faults:
            shorter = f"evaluation.max_new_tokens={room} leaves room for all; or " if (room := self._room()) else ""
            raise DataError(
                f"{len(self.faults)} samples exceed the model's context of {self.context} tokens:\n  "
                f"{first_few(self.faults)}\n{shorter}"
                "shorten them, or choose data.too_long=drop (leaves them out) or truncate (cuts their answers)"
            )
        if self.faults:
            counts = f"{self.left_out} samples left out, {self.cut} cut"
            log.info("data.too_long=%s: %s, which exceed %d tokens", self.policy, counts, self.context)
