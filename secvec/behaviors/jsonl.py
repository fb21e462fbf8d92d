"""An undesired behavior from the user's own rows."""

from __future__ import annotations

from typing import ClassVar

from secvec.behaviors.base import Behavior
from secvec.data.example import Shares, Split
from secvec.data.jsonl import JsonlFiles


class JsonlBehavior(JsonlFiles, Behavior):
    """Prompts with the response that must not be learned; in `align`, with the wanted one.

    Nobody but the user knows what shows the behavior: it has no judge of its own. Validation is for the gate. Where
    neither it nor `file` is given, it has its share of the rows in `vector`.
    """

    setting: ClassVar[str] = "behavior"
    shares: Shares = Shares(align=0, vector=0.6, validation=0.15, finetune=0, test=0.25)

    def _field(self, split: Split) -> str | None:
        return super()._field(split) or ("vector" if split == "validation" and self.vector else None)
