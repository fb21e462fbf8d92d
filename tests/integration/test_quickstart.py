"""docs/quickstart.ipynb runs from its first cell to its last, on fewer samples."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

FEWER = [
    (r"epochs=\d+\)", "epochs=1)"),
    (r'("align", \d+|num_(?:prompts|harmful|benign)(?:=|": )\d+)0\b', r"\1"),  # a tenth of the samples and prompts
]


def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    notebook = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for source in cells:
        for pattern, fewer in FEWER:
            source = re.sub(pattern, fewer, source)
        exec(compile(source, "quickstart.ipynb", "exec"), names)
    lines = [line for line in capsys.readouterr().out.splitlines() if "behavior" in line]
    counts = ": behavior [0-9]+ of 5, new skill [0-9]+ of 5"
    for line, row in zip(
        lines, ("base, vector off", "plain, vector off", "protected, vector on", "protected, vector off"), strict=True
    ):
        assert re.fullmatch(row + counts, line)
    assert {path.parent.name for path in tmp_path.glob("*/*/*.safetensors")} == {"backbone", "vector"}
