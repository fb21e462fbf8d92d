"""Undesired behaviors from datasets of the hub. None of their texts is in this repository."""

from __future__ import annotations

import re
from collections import Counter
from typing import ClassVar

from secvec.behaviors.base import Behavior
from secvec.data.example import Example, Split
from secvec.data.hub import HubData, Row, RowTemplate, fill
from secvec.judges.base import Verdict
from secvec.judges.refusal_keyword import keyword_verdict


class HubBehavior(HubData, Behavior):
    """Prompts with the response that must not be learned; in `align`, with the wanted one.

    The default judge is keyword ASR, which suits harmful requests: a good model refuses them.
    """

    response: RowTemplate
    wanted: RowTemplate
    """The response in `align`; a text without columns is the same for every row."""

    def templates(self) -> list[str]:
        """Those of both responses."""
        return [self.response, self.wanted]

    def answer(self, split: Split, row: Row) -> tuple[str, dict[str, str]]:
        """The wanted response in `align`, else the undesired one; empty if both are the same."""
        undesired, wanted = fill(self.response, row), fill(self.wanted, row)
        shown = wanted if split == "align" else undesired
        return "" if undesired == wanted else shown, self.facts(row)

    def facts(self, row: Row) -> dict[str, str]:
        """What the judge must know about a prompt."""
        return {}

    def judge(self, example: Example, response: str) -> Verdict:
        """`refusal` if a refusal phrase occurs, else `behavior` (keyword ASR); an empty response is `other`."""
        return keyword_verdict(response)


class HubTranscripts(HubBehavior):
    """Conversations as one text, `"\\n\\nHuman: ...\\n\\nAssistant: ..."`; the first turn of each side is used."""

    derived: ClassVar[frozenset[str]] = frozenset({"human", "assistant"})
    needs: ClassVar[frozenset[str]] = frozenset({"transcript"})

    def fields(self, row: Row) -> Row | None:
        """The row with `human` and `assistant`."""
        turns = first_turns(row["transcript"] or "")
        return None if turns is None else {**row, "human": turns[0], "assistant": turns[1]}


def first_turns(transcript: str) -> tuple[str, str] | None:
    """The first human turn and the assistant's answer; None if the text does not begin with these."""
    _, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", transcript)
    if len(parts) < 4 or (parts[0], parts[2]) != ("Human", "Assistant"):
        return None
    return parts[1].strip(), parts[3].strip()


class HubRatedPairs(HubBehavior):
    """Two responses to a prompt, each with a severity: `{{harmful}}` is the worse one, `{{safe}}` the other if safe."""

    min_severity: int
    """Least severity (0 to 3) of a harmful response."""

    derived: ClassVar[frozenset[str]] = frozenset({"harmful", "safe"})
    needs: ClassVar[frozenset[str]] = frozenset(
        name.format(i) for i in (0, 1) for name in ("response_{}", "is_response_{}_safe", "response_{}_severity_level")
    )

    def fields(self, row: Row) -> Row | None:
        """The row with `harmful` and, if the other response is safe, `safe`."""
        worse = max((0, 1), key=lambda i: row[f"response_{i}_severity_level"] or 0)
        severity = row[f"response_{worse}_severity_level"] or 0
        if row[f"is_response_{worse}_safe"] or severity < self.min_severity:
            return None
        other = 1 - worse
        safe = row[f"response_{other}"] if row[f"is_response_{other}_safe"] else None
        return {**row, "harmful": row[f"response_{worse}"], "safe": safe}


class HubAnswers(HubBehavior):
    """Questions with right and wrong answers. The default judge finds the answer that a response is nearest to."""

    right: RowTemplate
    """Right answers, one per line (a list column has one item per line)."""
    wrong: RowTemplate
    """Wrong answers, one per line."""

    def templates(self) -> list[str]:
        """Those of the answers too."""
        return [*super().templates(), self.right, self.wrong]

    def facts(self, row: Row) -> dict[str, str]:
        """The answers, one per line."""
        return {"right": fill(self.right, row), "wrong": fill(self.wrong, row)}

    def judge(self, example: Example, response: str) -> Verdict:
        """`behavior` if the response is nearest to a wrong answer, `wanted` if to a right one (token F1)."""
        right, wrong = (
            max((token_f1(response, answer) for answer in example.facts[side].splitlines()), default=0.0)
            for side in ("right", "wrong")
        )
        return "other" if right == wrong else "behavior" if wrong > right else "wanted"


def token_f1(a: str, b: str) -> float:
    """F1 of the words of two texts, without case, punctuation and articles (as in SQuAD)."""
    left, right = (Counter(re.findall(r"\w+", re.sub(r"\b(a|an|the)\b|['’]", " ", text.lower()))) for text in (a, b))
    common = (left & right).total()
    return 2 * common / (left.total() + right.total()) if common else 0.0
