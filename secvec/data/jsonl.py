"""The user's own rows, in one file or in one for each split."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from random import Random
from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from secvec.data.draw import share_out
from secvec.data.embedded import Ordinary
from secvec.data.example import SPLITS, AnswerMetric, Example, Shares, Split, Stream
from secvec.data.rows import TrainOn, read_rows
from secvec.data.tables import Source
from secvec.errors import TooFewError
from secvec.settings.schema import Settings

log = logging.getLogger(__name__)


class JsonlFiles(Settings):
    """Rows (`secvec.data.rows`) from a file for each split, or from one file that the splits share.

    Splits that share a file divide its rows by the hash of what begins a conversation: no prompt is in two splits, and
    the answers of a conversation stay together. Validation takes its share of `vector` where there is no other file.
    """

    remedy: ClassVar[str] = "file=FILE for all splits, or one for each (vector, finetune, test)"
    setting: ClassVar[str] = "data.benign.NAME"
    """Where its settings stand, for messages."""

    file: Source | None = None
    """For all splits that have no file of their own, in the proportions of `shares`."""
    align: Source | None = None
    vector: Source | None = None
    validation: Source | None = None
    finetune: Source | None = None
    test: Source | None = None
    shares: Shares
    train_on: TrainOn = "all"
    """Which assistant turns of a conversation are samples: all, or the last."""

    @field_validator("shares", mode="before")
    @classmethod
    def _others_keep_theirs(cls, given: Any) -> Any:
        default = cls.model_fields["shares"].default
        if isinstance(given, Mapping) and isinstance(default, Shares):
            return default.model_dump() | dict(given)
        return given

    @model_validator(mode="after")
    def _has_rows(self) -> JsonlFiles:
        if not any(map(self._field, SPLITS)):
            raise ValueError(f"no file is given: {self.remedy}")
        return self

    @property
    def is_local(self) -> bool:
        """Whether all rows are on this machine."""
        return all(Path(getattr(self, field)).exists() for field in set(map(self._field, SPLITS)) if field)

    def all_rows(self) -> list[Example]:
        """The rows of all splits."""
        return [row for field in dict.fromkeys(map(self._field, SPLITS)) if field for row in self._read(field)]

    def rows(self, split: Split) -> list[Example]:
        """All rows of `split`, in the order of the file; for held-out splits one of each prompt. Raises TooFewError."""
        field = self._field(split)
        if field is None:
            share = f", or a share of {self.file} ({self.setting}.shares.{split}=0.3)" if self.file else ""
            raise TooFewError(f"no file for split {split!r}: set {split}=FILE{share}", 0)
        rows = self._read(field)
        if len(sharing := self._sharing(field)) > 1:
            openings = sorted({row.opening for row in rows}, key=_place)
            spare = max(0, len(openings) - len(sharing))  # beyond one for each
            counts = [1 + n for n in share_out(spare, [getattr(self.shares, other) for other in sharing])]
            first = sum(counts[: sharing.index(split)])
            mine = set(openings[first : first + counts[sharing.index(split)]])
            rows = [row for row in rows if row.opening in mine]
        if split in ("validation", "test"):
            rows = list({row.key: row for row in reversed(rows)}.values())[::-1]
        return rows

    def examples(self, split: Split, n: int | None, seed: int) -> list[Example]:
        """The first `n` rows of `split` in the order of `seed`; None: all. Raises TooFewError if there are fewer."""
        if n == 0:
            return []
        rows = self.rows(split)
        if not rows or (n is not None and n > len(rows)):
            field = str(self._field(split))
            where = f"{getattr(self, field)} has {len(rows)} rows for split {split!r}"
            shared = ""
            if len(self._sharing(field)) > 1:
                openings = len({row.opening for row in self._read(field)})
                shared = f" (the splits share its {openings} different first messages)"
            raise TooFewError(f"{where}{shared}, the run needs {n or 1}", len(rows))
        return Random(f"{split}/{seed}").sample(rows, len(rows))[:n]

    def _read(self, field: str) -> list[Example]:
        return read_rows(getattr(self, field), self.kind, self.train_on)  # type: ignore[attr-defined]  # of the subclasses

    def _sharing(self, field: str) -> list[Split]:
        return [split for split in SPLITS if self._field(split) == field]

    def _field(self, split: Split) -> str | None:
        """The setting that names the rows of `split`."""
        if getattr(self, split):
            return split
        return "file" if self.file and getattr(self.shares, split) else None


def _place(opening: object) -> bytes:
    return blake2b(repr(opening).encode(), digest_size=8).digest()


class JsonlStream(JsonlFiles, Stream):
    """Benign rows: a `task` is to be learned, `ordinary` rows must stay as they are, `neutral` are for the KL term."""

    kind: Literal["task", "ordinary", "neutral"]
    shares: Shares = Shares(align=0, vector=0.1, validation=0.05, finetune=0.7, test=0.15)


class UntrustedStream(JsonlFiles, Stream):
    """Fine-tuning data of which nobody knows which rows are undesired: without labels, and never in the KL term."""

    remedy: ClassVar[str] = "data.file=FILE"
    kind: Literal["untrusted"] = "untrusted"
    metric: AnswerMetric = "none"
    """The references may show the behavior: being near them is no merit, unless the user knows better."""
    shares: Shares = Shares(align=0, vector=0, validation=0, finetune=0.9, test=0.1)


NUM_GENERAL = 300
"""Embedded requests where a count is null."""


class GeneralStream(JsonlFiles, Stream):
    """Benign rows for the KL term beside untrusted data: those of `vector`, else embedded ordinary requests.

    They are never taken from the untrusted file: its undesired rows would teach the vector to do nothing on the very
    prompts that it is for, and which rows these are nobody knows. Embedded requests are surely benign, but far from the
    user's task: the vector then changes more of the task while it is on. Rows of your own near the task are better.
    """

    kind: Literal["neutral"] = "neutral"
    shares: Shares = Shares()

    @model_validator(mode="after")
    def _has_rows(self) -> GeneralStream:
        return self

    def examples(self, split: Split, n: int | None, seed: int) -> list[Example]:
        """The first `n` examples of `split` under `seed`."""
        if self._field("vector"):
            return super().examples(split, n, seed)
        log.info("the KL term uses embedded general requests; name benign rows near your data with data.kl_file=FILE")
        return Ordinary(name="general", kind=self.kind).examples(split, NUM_GENERAL if n is None else n, seed)
