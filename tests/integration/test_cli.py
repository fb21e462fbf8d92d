"""The commands as a person types them: exit codes, messages, and what is left on disk."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from commands import run_command
from conftest import ROOT, SMALL


@pytest.fixture
def run(tmp_path: Path):  # type: ignore[no-untyped-def]
    """`run("train.py", ...)` in an empty folder."""

    def call(script: str, *given: str) -> subprocess.CompletedProcess[str]:
        places = [] if given[:1] in (("--help",), ("--cfg",)) else [f"paths.outputs={tmp_path / 'out'}"]
        return run_command(script, *given, *places, cwd=tmp_path, env={"COLUMNS": "200"})

    return call


def left(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_everything_that_does_not_compose_is_said_at_once(script: str, run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = run(script, "evaluation.nun_prompts=1", "bahavior=jsonl", "trainer=gpus", "seed=1")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    heading, *faults = done.stderr.strip().splitlines()
    assert heading.startswith("error: ") and len(faults) == 3, done.stderr
    text = "\n".join(faults)
    assert "evaluation.nun_prompts=1: unknown key (did you mean 'num_prompts'?); known here: batch_size, max" in text
    assert "bahavior=jsonl: unknown key (did you mean 'behavior'?)" in text
    assert "trainer=gpus: no such choice (did you mean 'gpu'?); allowed: cpu, ddp, default, fsdp, gpu" in text
    assert list(tmp_path.iterdir()) == []


def test_everything_that_does_not_validate_is_said_at_once(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = run("train.py", "stage=fintune", "vector.r=0", "behavior=jsonl")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    lines = done.stderr.strip().splitlines()
    assert lines[0].startswith("error: ") and len(lines) == 4, done.stderr
    assert (
        "stage: got 'fintune'; allowed: 'vector', 'finetune', 'infer' or 'all' (did you mean 'finetune'?)" in lines[-2]
    )
    assert "vector.r: got 0" in lines[-1]
    assert left(tmp_path) == [] and not any((tmp_path / "out").glob("*"))


RAISES = """
import sys
from secvec.cli import run_command

def main(cfg):
    raise {error}

sys.exit(run_command("train", main))
"""


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        ("TypeError('no such thing')", 1, "Traceback (most recent call last)"),
        ("OSError(28, 'No space left on device', 'a/b')", 2, "error: a/b: No space left on device; fix this"),
        ("PermissionError(13, 'Permission denied', 'a/b')", 2, "error: a/b: Permission denied; fix this"),
        ("RuntimeError('unexpected pos 9') from OSError(28, 'No space')", 2, "error: No space; fix this"),
        ("ValueError('I/O error: full (os error 28)')", 2, "error: No space left on device; fix this"),
    ],
)
def test_a_fault_of_the_program_or_of_the_disk_is_not_told_as_a_wrong_setting(
    error: str,
    code: int,
    says: str,
    run,  # type: ignore[no-untyped-def]
    tmp_path: Path,
) -> None:
    (tmp_path / "raises.py").write_text(RAISES.format(error=error))
    done = run(tmp_path / "raises.py")
    assert done.returncode == code and says in done.stderr, done.stderr
    assert "cannot be composed" not in done.stderr and ("Traceback" in done.stderr) == (code == 1)
    assert ("no such thing" in done.stderr) == (code == 1)


def test_help_and_the_composed_config(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = run("train.py", "--help")
    assert done.returncode == 0, done.stderr
    names = ", ".join(sorted(file.stem for file in (ROOT / "conf" / "defense").glob("*.yaml")))
    assert f"defense: {names}\n" in done.stdout and "experiment: bench, bench_smollm2, demo, " in done.stdout
    assert "Traceback" not in done.stderr + done.stdout
    done = run("train.py", "--cfg", "job", "vector.r=3")
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load(done.stdout)
    assert config["vector"]["r"] == 3 and config["defense"]["name"] == "security_vector"
    assert left(tmp_path) == []


@pytest.mark.slow  # test_multirun.py shows it with the stand-in, test_wheel.py trains in a multirun
def test_a_failed_job_of_a_multirun_does_not_take_the_other_with_it(run, cache: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = run(
        "train.py", "-m", *SMALL, "defense=none", "data.harmful_ratio=0.5,1.5", "hydra.launcher.n_jobs=2", "sweep=two",
        f"paths.cache={cache}",
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "1 of 2 jobs failed" in done.stderr and "data.harmful_ratio: got 1.5; " in done.stderr
    folder = tmp_path / "out" / "two"
    records = {path.parent: json.loads(path.read_text()) for path in folder.glob("*/record.json")}
    assert sorted(record["status"] for record in records.values()) == ["completed", "failed"]
    for path, record in records.items():
        assert record["config"]["data"]["harmful_ratio"] == (0.5 if record["status"] == "completed" else 1.5)
        assert record["defense"] == "none" and record["run"] == path.name
        if record["status"] == "failed":
            assert "data.harmful_ratio: got 1.5" in record["error"] and not (path / "backbone").exists()
        else:
            assert "after/behavior_rate" in record["metrics"] and (path / "backbone" / "config.json").is_file()
    page = (folder / "report.html").read_text()
    assert "harmful_ratio: got 1.5" in page


def test_evaluations_sweep_too(tmp_path: Path) -> None:
    script = (ROOT / "evaluate.py").read_text()  # its jobs fail before they import anything heavy, as a stand-in's do
    (tmp_path / "evaluate.py").write_text(f"import stand_in  # noqa: F401\n{script}")
    given = ["recipe=tiny", "model.name_or_path=a", "evaluation.num_prompts=-1,-2", "paths.outputs=out"]
    done = run_command(tmp_path / "evaluate.py", "-m", *given, cwd=tmp_path)
    assert done.returncode == 2 and "2 of 2 jobs failed" in done.stderr, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and all(f"num_prompts: got {n}; " in done.stderr for n in (-1, -2))
    (folder,) = (tmp_path / "out" / "multirun").iterdir()
    assert folder.name.startswith("evaluation.num_prompts-")


@pytest.mark.parametrize("given", [["defense=anchored_vector,anchor"], ["experiment=ablation/anchor_parts"]])
def test_a_setting_of_a_choice_that_is_swept_is_told_how_it_can_be_given(given: list[str], run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    done = run("train.py", "-m", *given, "defense.weight=0.2")
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    assert "defense is swept, and its settings are read before one is chosen: give defense=NAME" in done.stderr
