"""Reports from the records that a report.json has kept, where the run folders are gone: as those in results/."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
from made_up_runs import RATES, write_run

from secvec.report import render
from secvec.report.__main__ import main

ROOT = Path(__file__).parents[2]
OF_RECORDS = ("Results", "Worst case", "Leak probes", "Mechanism")
"""Sections that need neither answers nor curves."""


def sections(report: Path) -> dict[str, str]:
    parts = re.split(r"^## (.*)\n", report.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: text for name, text in zip(parts[1::2], parts[2::2], strict=True) if name in OF_RECORDS}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Of two seeds and every defense, with their report."""
    for defense in RATES:
        for seed in range(2):
            write_run(tmp_path / "runs", defense, seed)
    assert main([str(tmp_path / "runs")]) == 0
    return tmp_path / "runs"


@pytest.fixture
def kept(runs: Path, tmp_path: Path) -> Path:
    """What a repository would keep of them."""
    (tmp_path / "kept").mkdir()
    shutil.copy(runs / "report.json", tmp_path / "kept")
    return tmp_path / "kept"


def test_kept_records_make_the_tables_that_the_runs_made(runs: Path, kept: Path, tmp_path: Path) -> None:
    assert main([str(kept), "--to", str(tmp_path / "new")]) == 0
    made = sections(tmp_path / "new" / "report.md")
    assert made == sections(runs / "report.md") and {"Results", "Mechanism"} <= set(made)
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == json.loads((kept / "report.json").read_text())


def test_a_run_of_an_old_version_has_its_report(tmp_path: Path) -> None:
    assert main([str(ROOT / "tests" / "data"), "--to", str(tmp_path)]) == 0
    made = sections(tmp_path / "report.md")
    assert "| base | security_vector |" in made["Results"] and made["Results"].count("(1 × 6)") >= 4
    assert "Vector on" in made["Mechanism"]


def test_runs_of_one_s_own_stand_beside_kept_ones(kept: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "mine", "none", 7)
    assert main([str(tmp_path / "mine"), str(kept)]) == 0
    assert "(3 × 100)" in sections(tmp_path / "mine" / "report.md")["Results"]


def test_the_only_copy_of_records_is_not_written_over(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (kept / "report.json").read_bytes()
    for given in ([str(kept)], [str(kept), "--to", str(kept / "new")]):
        assert main(given) == 2
        assert "holds kept records and no runs" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == {"report.json": before}


def test_what_is_no_list_of_records_is_named(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, says in (("{}", "are a JSON array, this is a dict"), ("[3]", "a record is a JSON object")):
        (kept / "report.json").write_text(text)
        assert main([str(kept), "--to", str(kept.parent / "new")]) == 2
        error = capsys.readouterr().err
        assert says in error and "report.json" in error
    assert not (kept.parent / "new").exists()


@pytest.mark.parametrize(
    "folder",
    sorted({path.parent for path in (ROOT / "results").rglob("report.json")} - {ROOT / "results" / "scan"}),
    ids=lambda found: found.name,
)
def test_every_table_in_results_says_what_its_records_say(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(render, "_html", lambda *_: "")  # its figures take longer than all else
    assert main([str(folder), "--to", str(tmp_path)]) == 0
    shown = sections(folder / "report.md")
    assert shown == sections(tmp_path / "report.md") and "Results" in shown


KEPT = {file.stem for file in (ROOT / "results" / "performance").glob("*.json")} | {"scan"}
OTHERS = {"scan_lm": "scan/smollm2.json", "defenses": "bench/report.json"}
KEPT |= {script for script, record in OTHERS.items() if (ROOT / "results" / record).is_file()}


@pytest.mark.parametrize("name", sorted(KEPT))
def test_the_table_of_a_benchmark_says_what_its_records_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for `python benchmarks/NAME.py`
    script = runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"))
    made = script["table"](json.loads(script["RECORDS"].read_text(encoding="utf-8")))
    assert made.startswith("| ") and f"-->\n\n{made}\n\n<!-- end" in script["PAGE"].read_text(encoding="utf-8")


def test_the_only_copy_of_records_is_never_overwritten(kept: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As when a job is added to a sweep whose other runs were cleaned up: the multirun writes its report by itself."""
    before = (kept / "report.json").read_text()
    write_run(kept, "none", 7)
    for _ in range(2):
        assert main([str(kept)]) == 0
    assert (kept / "report.1.json").read_text() == before and not (kept / "report.2.json").exists()
    assert len(json.loads((kept / "report.json").read_text())) == 1


def test_answers_during_the_demo_s_training_took_at_most_three_percent_of_it() -> None:
    records = json.loads((ROOT / "results" / "demo" / "report.json").read_text(encoding="utf-8"))
    assert records
    for seconds in (record["wall_seconds"] for record in records):
        assert 0 < seconds["during"] < 0.03 * seconds["finetune"]
