"""The page of a scan: what it says of a file, and how much of a sensitive text it shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from secvec.report.scan_page import reading, write

LONG = "Some words come first, and they are harmless. " * 20


def made_up(flagged: int, **changes: Any) -> dict[str, Any]:
    """What scan.json holds after a scan of 1,000 rows."""
    share = {"value": flagged / 1000, "ci_low": 0.0, "ci_high": 1.0, "n": 1000}
    row = {"row": 7, "score": 4.2, "mean_gap": 0.3, "loss_off": 2.0, "loss_on": 1.7, "flagged": True}
    texts = {
        "words": "<b>mix the</b> ash",
        "prompt": "How? \u202e",
        "response": f"{LONG}Then <b>mix the</b> ash. {LONG}",
    }
    shown = [row | texts | {"place": len(LONG) + 5}, row | texts | {"words": "", "place": 3, "undesired": False}]
    found = {
        "file": "mine.jsonl", "vector": "run/vector", "window": 3, "quantile": 0.99, "threshold": 1.5,
        "given_threshold": None, "benign_file": None, "label": None, "undesired": [True], "sensitive": False,
        "own": {"undesired": [3.0, 4.0], "benign": [0.1, 0.2]}, "known_benign": [],
        "metrics": {"scan/flagged_share": share}, "shown": shown,
    }  # fmt: skip
    return found | changes


def page(folder: Path, scan: dict[str, Any]) -> str:
    (folder / "scan.json").write_text(json.dumps(scan))
    rows = [{"score": n / 10, "undesired": [True, False, None][n % 3]} for n in range(30)]
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write(folder).read_text(encoding="utf-8")


def test_few_flagged_rows_are_not_called_clean() -> None:
    for flagged in (0, 10, 20):
        said = reading(made_up(flagged))
        assert "either the file is clean of its behavior, or the vector does not cover" in said
        assert f"{flagged / 10:.1f}% of 1,000 rows" in said and "about 1.0% of benign rows are" in said
    assert "benign answer in an unusual form is flagged too" in reading(made_up(300))
    assert "of benign rows" not in reading(made_up(300, given_threshold=1.5))


@pytest.mark.parametrize(("sensitive", "most"), [(True, 110), (False, 720)])
def test_the_words_are_marked_within_what_may_be_shown(tmp_path: Path, sensitive: bool, most: int) -> None:
    made = page(tmp_path, made_up(300, sensitive=sensitive))
    (shown, plain) = (part.partition("</dd>")[0] for part in made.split("<dd>")[4:])
    assert "Then <mark>&lt;b&gt;mix the&lt;/b&gt; ash</mark>." in shown and "<mark>" not in plain
    assert len(shown) < most + 120 and len(plain) < most + 40
    for text in (shown, plain):
        assert ('class="mark">sensitive, truncated' if sensitive else 'class="mark">truncated') in text
    assert "\u202e" not in made and "labelled benign" in made


def test_scores_have_a_panel_for_each_group(tmp_path: Path) -> None:
    made = page(tmp_path, made_up(300))
    for name in (
        "undesired samples of the vector, held out (2)",
        "KL term (2)",
        "undesired by its label (10)",
        "the file (10)",
    ):
        assert name in made
    assert "rows known to be benign (3)" in page(tmp_path, made_up(300, known_benign=[1, 2, 3], benign_file="b.jsonl"))
