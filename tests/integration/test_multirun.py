"""Multiruns as a person types them, over a stand-in that trains nothing: launchers, the search, what is on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from commands import run_command
from conftest import ROOT

from tests.integration.test_loggers import records as wandb_records
from tests.integration.test_loggers import summary_of


@pytest.fixture
def multirun(tmp_path: Path):  # type: ignore[no-untyped-def]
    """`multirun("seed=0,1", ...)` in an empty folder."""
    shutil.copy(ROOT / "tests" / "stand_in.py", tmp_path)

    def call(*given: str, outputs: str = "out") -> subprocess.CompletedProcess[str]:
        env = {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        return run_command(tmp_path / "stand_in.py", "-m", *given, f"paths.outputs={outputs}", cwd=tmp_path, env=env)

    return call


def records(folder: Path) -> dict[int, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in folder.glob("*/record.json")]
    return {record["seed"]: record for record in found}


def only_folder(folder: Path) -> Path:
    """The one folder of a multirun without a name."""
    (found,) = (folder / "multirun").iterdir()
    return found


def starts(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.glob("*/starts"))


def test_failures_are_recorded_and_a_second_start_runs_only_what_is_missing(multirun, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    given = ["hydra.launcher.n_jobs=2", "seed=0,13,14", "logger=wandb"]
    done = multirun(*given)
    folder = only_folder(tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr
    assert "2 of 3 jobs failed" in done.stderr and "seed 14 is not liked" in done.stderr
    assert "1 done, 2 failed, 0 left" in done.stdout
    found = records(folder)
    assert {seed: record["status"] for seed, record in found.items()} == {0: "completed", 13: "failed", 14: "failed"}
    assert "signal 9" in found[13]["error"] and found[14]["error"] == "seed 14 is not liked"
    assert len(json.loads((folder / "report.json").read_text())) == 3
    assert starts(folder) == 3
    for seed, name in ((13, "seed=13"), (14, "seed=14")):  # neither could tell W&B itself
        (told,) = [path for path in folder.glob(f"*-s{seed}-*") if (path / "wandb").is_dir()]
        shown = summary_of(told)
        said = found[seed]["error"]
        assert (shown["state"], shown["exit_code"], shown["summary"]["error"]) == ("failed", 1, said)
        assert wandb_records(told, "run")[0]["display_name"] == name
    again = multirun(*given)
    assert "1 of 3 jobs are finished already" in again.stdout and starts(folder) == 5


def test_a_queue_runs_the_same_jobs(multirun, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = multirun("hydra/launcher=slurm", "hydra.launcher.cluster=local", "seed=0,13")
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout, done.stderr
    assert "1 of 2 jobs failed" in done.stderr and "1 done, 1 failed, 0 left" in done.stdout
    folder = only_folder(tmp_path / "out")
    found = records(folder)
    assert {seed: record["status"] for seed, record in found.items()} == {0: "completed", 13: "failed"}
    assert "signal 9" in found[13]["error"] and starts(folder) == 2
    assert len(json.loads((folder / "report.json").read_text())) == 2


def test_collisions_are_refused_before_anything_starts(multirun, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for given, says in (
        (["seed=0,1", "seed=2"], "seed is given twice, seed=0,1 and seed=2"),
        (["stage=vector,finetune", "seed=0,1"], "two jobs of the multirun would share the folder"),
        (["seed=0,1", "hydra.launcher.n_jobs=many"], "hydra.launcher.n_jobs: got 'many'"),
    ):
        done = multirun(*given)
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not list(tmp_path.rglob("starts"))
    (tmp_path / "file").write_text("")
    done = multirun("seed=0,1", outputs="file/out")
    assert done.returncode == 2 and "composed" not in done.stderr, done.stderr
    assert "file/out/multirun/seed-" in done.stderr and ": Not a directory" in done.stderr
    done = multirun("hydra/launcher=slrum")
    assert done.returncode == 2 and "(did you mean 'slurm'?); allowed: basic, process, slurm" in done.stderr


def test_a_sweep_without_a_name_gets_a_folder_of_its_own(multirun, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "out" / "multirun"
    for _ in range(2):  # the same command goes on in the same folder
        assert multirun("seed=0,1").returncode == 0
        assert len(list(folder.iterdir())) == 1
    (first,) = folder.iterdir()
    assert first.name.startswith("seed-") and starts(first) == 2
    assert {record["sweep"] for record in records(first).values()} == {f"multirun/{first.name}"}
    assert multirun("seed=0,1", "tune=lora").returncode == 0
    assert len(list(folder.iterdir())) == 2


def test_every_job_s_plan_is_printed_and_what_is_there_stays(multirun, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    record = tmp_path / "out" / "some" / "job" / "record.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    done = multirun("+plan=true", "sweep=some", "seed=0,14")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "\n# seed=0\nplan: seed 0\n" in done.stdout and "1 of 2 jobs would fail: seed=14" in done.stderr
    assert {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()} == {"record.json", "multirun.yaml"}
    assert record.read_text() == "{}"
    multirun("+plan=true", "sweep=other", "seed=0")
    assert not (tmp_path / "out" / "other").exists(), list((tmp_path / "out" / "other").rglob("*"))


def test_the_search_path_is_handed_to_the_jobs(multirun, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text("# @package _global_\nsweep: own\nstage: vector\n")
    done = multirun(f"hydra.searchpath=[file://{tmp_path / 'mine'}]", "experiment=own", "seed=1,2")
    assert done.returncode == 0, done.stdout + done.stderr
    found = records(tmp_path / "out" / "own")
    assert {seed: record["stage"] for seed, record in found.items()} == {1: "vector", 2: "vector"}


def test_a_sweep_over_the_vector_runs_a_defense_without_one_once(multirun, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = multirun("defense=none,security_vector", "vector.r=2,4", "sweep=mine", "hydra.launcher.n_jobs=3")
    assert done.returncode == 0, done.stderr
    found = [json.loads(path.read_text()) for path in (tmp_path / "out" / "mine").glob("*/record.json")]
    assert sorted(record["defense"] for record in found) == ["none", "security_vector", "security_vector"]
    assert starts(tmp_path / "out" / "mine") == 3


def test_a_multirun_without_its_report_has_not_ended_well(multirun, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    broken = tmp_path / "out" / "mine" / "another" / "record.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    done = multirun("seed=0,1", "sweep=mine")
    assert done.returncode == 2 and "not valid JSON" in done.stderr and "there is no report of them" in done.stderr


def test_a_search_goes_on_where_it_was_cut_off(multirun, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    space = "{optimizer.lr: {low: 1e-3, high: 1.0, log: true}, tune: [full, lora], defense: [none]}"
    bounds = "{after/task_accuracy: {min: 0.7}}"
    given = [
        "hydra/sweeper=search", f"+hydra.sweeper.space={space}", f"+hydra.sweeper.bounds={bounds}", "seed=1",
        "defense=none", "hydra.sweeper.n_startup_trials=2", "hydra.launcher.n_jobs=2",
    ]  # fmt: skip
    short = multirun(*given, "hydra.sweeper.n_trials=2")
    folder = only_folder(tmp_path / "out")
    assert short.returncode == 0, short.stdout + short.stderr
    first = json.loads((folder / "search.json").read_text())["trials"]
    before = starts(folder)
    done = multirun(*given, "hydra.sweeper.n_trials=4")
    assert done.returncode == 0 and "search: 4 of 4 trials" in done.stdout, done.stdout + done.stderr
    found = json.loads((folder / "search.json").read_text())
    assert found["trials"][:2] == first and len(found["trials"]) == 4
    failed = [trial for trial in found["trials"] if trial["value"] is None]
    again = sum(trial["value"] is None for trial in first)  # only what failed before is tried again
    assert starts(folder) - before == 2 + again
    assert all("the loss is nan" in trial["error"] and trial["params"]["optimizer.lr"] > 0.1 for trial in failed)
    known = [
        trial for trial in found["trials"] if trial["value"] is not None and trial["params"]["optimizer.lr"] <= 0.03
    ]
    assert found["best"] == (max(known, key=lambda trial: trial["value"]) if known else None)
    assert set(found["trials"][0]["params"]) == {"optimizer.lr", "tune"}  # the command line has fixed the rest
    assert (folder / "report.json").is_file()
