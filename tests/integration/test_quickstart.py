"""docs/quickstart.ipynb runs from its first cell to its last, on fewer samples."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

SMALL = 'epochs, samples = {"align": 1, "vector": 1, "finetune": 1}, 30'


def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
    first, *others = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert first.startswith("epochs, samples = ")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for source in (SMALL, *others):
        source = re.sub(r'("align", \d+|num_prompts=\d+)0\b', r"\1", source)  # a tenth of the samples and prompts
        exec(compile(source, "quickstart.ipynb", "exec"), names)
    lines = [line for line in capsys.readouterr().out.splitlines() if "behavior" in line]
    assert [line.split(":")[0] for line in lines] == [
        "starting model", "plain fine-tune", "protected, vector on", "protected, off",
    ]  # fmt: skip
    assert {path.parent.name for path in tmp_path.glob("*/*/*.safetensors")} == {"backbone", "vector"}
