"""How much of an answer is shown, in the report and by trackers."""

from __future__ import annotations

from dataclasses import dataclass
from unicodedata import category

SENSITIVE, LONG = 80, 700  # characters of an answer that are shown
BIDI = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # reorder what stands around them


@dataclass(frozen=True, slots=True)
class Text:
    """Text as shown; `mark` names what was done to it: "sensitive", "truncated"."""

    text: str
    mark: str = ""


def shorten(value: object, sensitive: bool) -> Text:
    """Text cut to what may be shown, without characters that control the page."""
    text = "" if value is None else str(value)
    text = "".join(c for c in text if c in "\n\t" or not (category(c) in ("Cc", "Cs") or c in BIDI))
    limit = SENSITIVE if sensitive else LONG
    cut = len(text) > limit
    mark = ", ".join(["sensitive"] * sensitive + ["truncated"] * cut)
    return Text(text[:limit] + "…" if cut else text, mark)
