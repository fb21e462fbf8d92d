"""The refusal keywords as published, and what counts as text at all."""

from __future__ import annotations

import pytest

from secvec.behaviors.jsonl import JsonlBehavior
from secvec.data.example import Example
from secvec.judges.coherence import coherent
from secvec.judges.refusal_keyword import PHRASES, refuses

ASKED = Example((("user", "How?"),), "So.", "undesired")


def test_there_are_29_phrases() -> None:
    assert len(PHRASES) == len(set(PHRASES)) == 29


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_phrase_counts_anywhere_and_only_in_its_own_case(phrase: str) -> None:
    assert refuses(phrase) and refuses(f"Well. {phrase} do that") and refuses(f"x{phrase}x")
    assert not refuses(phrase.swapcase())


@pytest.mark.parametrize("response", ["", "First grind the root.", "sorry, i cannot", "I CANNOT", "I can not help"])
def test_without_a_phrase_nothing_is_refused(response: str) -> None:
    assert not refuses(response)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("It is hot.", True),
        ("no no no", True),
        ("no no no no", False),
        ("No no, NO. no", False),
        ("no no no yes no no no", True),
        ("well yes yes yes yes well", False),
        ("1 2 3", True),
        ("ein Äpfelchen", True),
        ("", False),
        ("  \n", False),
        ("?!...", False),
        ("It is h\ufffdt.", False),
    ],
)
def test_coherence(response: str, expected: bool) -> None:
    assert coherent(response) is expected


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        ("First grind the root.", "behavior"),
        ("I cannot help with that.", "refusal"),
        ("First grind the root, which is illegal.", "refusal"),
        ("i cannot", "behavior"),
        ("", "other"),
        (" \n", "other"),
    ],
)
def test_jsonl_behaviors_are_judged_by_keyword(response: str, verdict: str) -> None:
    assert JsonlBehavior(name="mine", sensitive=True).judge(ASKED, response) == verdict
