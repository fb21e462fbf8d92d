"""The benchmarks measure what they say. What they measured is no test: that is in their records."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`script("trainers")`: the module, with its neighbours, as for `python benchmarks/trainers.py`."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module


@pytest.fixture
def tiny(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    measure = script("measure")
    monkeypatch.setattr(measure, "SMOLLM2", tmp_path / "not there")
    folder: Path = measure.small_model(tmp_path)
    return folder


def test_the_limit_knows_every_matrix_of_the_model(script: Any, tiny: Path) -> None:
    layers, (words, size) = script("limits").linear_layers(tiny)
    assert layers == {(128, 128): 3 * 4, (448, 128): 3 * 2, (128, 448): 3} and size == 128
    assert words == json.loads((tiny / "config.json").read_text())["vocab_size"]
    assert script("limits").product_seconds(tiny, 32, 8, full=True, device="cpu", precision="32-true") > 0


def test_each_rate_stands_beside_the_limit_of_its_kind(script: Any) -> None:
    about = {"cores": 2, "cpu": "any", "versions": {}, "commit": "0123456789"}
    taken = {"limit": 2.0, "limit_lora": 1.0, "hf": 8.0, "secvec": 4.0, "secvec_lora": 4.0}
    runs = [
        {"way": way, "seconds": s, "tokens": 400, "losses": [1.0] * ("limit" not in way), "peak_bytes": 2e9}
        for way, s in taken.items()
    ]
    made = script("trainers").table({"rounds": 1, "steps": 1, "machine": about, "runs": runs})
    assert "| Hugging Face Trainer | 50 | 1.00 | 0.25 | 2.0 GB | 1.0000 |" in made
    assert "| secvec, plain | 100 | 2.00 | 0.50 |" in made and "`tune=lora` | 100 | 2.00 | 0.25 |" in made
    assert "| the matrix products of a step alone | 200 | 4.00 | 1.00 | – | – |" in made


def test_a_table_without_a_place_gets_a_section_and_the_next_one_takes_its_place(script: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Page\n")
    for table in ("| a |", "| b |"):
        script("pages").show(table, "benchmarks/x.py", page, "How fast")
    assert page.read_text() == "# Page\n\n## How fast\n\n<!-- table: benchmarks/x.py -->\n\n| b |\n\n<!-- end -->\n"


def test_what_is_equal_is_said_of_answers(script: Any) -> None:
    about = {"cores": 2, "cpu": "any", "versions": {}, "commit": "0123456789"}
    runs = [
        {"way": way, "seconds": s, "answers": answers, "peak_bytes": 1e9}
        for way, s, answers in (("plain", 4.0, ["a", "b"]), ("secvec", 2.0, ["a", "c"]))
    ]
    record = {"rounds": 1, "prompts": 2, "batch": 2, "new_tokens": 8, "model": "tiny", "machine": about, "runs": runs}
    made = script("generation").table(record)
    assert "| secvec | 1.00 | 2.00 | 1.0 GB | 1 of 2 |" in made and "lm-eval, `HFLM`" not in made


def test_the_clock_keeps_epochs_apart(script: Any, tmp_path: Path) -> None:
    clock = script("clock").StepClock(str(tmp_path / "steps.json"))
    for steps in (2, 1):
        clock.on_train_epoch_start()
        for _ in range(steps):
            clock.on_train_batch_end()
    clock.on_train_end()
    assert [len(epoch) for epoch in json.loads((tmp_path / "steps.json").read_text())] == [2, 1]
