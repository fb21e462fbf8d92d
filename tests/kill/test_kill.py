"""Killed and interrupted runs: nothing half-written, and the same command ends where an undisturbed run ends."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, SMALL
from safetensors.torch import load_file

from secvec.config.schema import RunConfig
from secvec.run import train

pytestmark = pytest.mark.slow

LONG = ["finetune.epochs=40", "telemetry.every_n_steps=50"]
LONGER = list({text.partition("=")[0]: text for text in [*SMALL, *LONG]}.values())
"""The same for a multirun, which takes each key once."""


def start(folder: Path, cache: Path) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "train.py"), *SMALL, *LONG, f"paths.cache={cache}", f"hydra.run.dir={folder}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    limit = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1][-2000:]
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_the_same_command_goes_on(
    make_config: Callable[..., RunConfig], cache: Path, tmp_path: Path, sign: signal.Signals, code: int
) -> None:
    undisturbed = make_config(*LONG, run="undisturbed")
    train(undisturbed)
    shutil.rmtree(cache / "finetuned")  # the backbone is trained again
    folder = tmp_path / "cut"
    process = start(folder, cache)
    last = folder / "checkpoints" / "finetune" / "last.ckpt"
    wait_for(last.is_file, process)
    os.killpg(process.pid, sign)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors[-2000:]
    assert not (folder / "backbone").exists() and last.is_file()
    if code == 130:
        assert "goes on" in errors and "Traceback" not in errors

    again = start(folder, cache)
    _, errors = again.communicate(timeout=200)
    assert again.returncode == 0, errors[-2000:]
    assert "going on from" in (folder / "train.log").read_text()
    ours, whole = (load_file(d / "backbone" / "model.safetensors") for d in (folder, Path(undisturbed.run_dir)))
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    record = json.loads((folder / "record.json").read_text())
    assert record["status"] == "completed" and not (folder / "checkpoints").exists()
    assert record["metrics"] == json.loads((Path(undisturbed.run_dir) / "record.json").read_text())["metrics"]


def test_an_interrupted_multirun_goes_on(cache: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, str(ROOT / "train.py"), "-m", *LONGER, "defense=none,security_vector", "seed=0,1",
        f"paths.cache={cache}", f"paths.outputs={tmp_path}", "sweep=cut",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    sweep = tmp_path / "cut"
    wait_for(
        lambda: len(list(sweep.glob("*/record.json"))) >= 1 and len(list(sweep.glob("*/console.log"))) >= 2, process
    )
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=90)
    assert process.returncode == 130 and "Traceback" not in errors, errors[-2000:]
    done = {f: f.stat().st_mtime_ns for f in sweep.glob("*/backbone/model.safetensors")}
    assert 1 <= len(done) < 4
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert all(f.stat().st_mtime_ns == stamp for f, stamp in done.items())  # not run again
    records = json.loads((sweep / "report.json").read_text())
    assert len(records) == 4 and {record["status"] for record in records} == {"completed"}


def multirun(folder: Path) -> subprocess.Popen[bytes]:
    """Two small jobs side by side, everything of theirs in `folder`."""
    command = [
        sys.executable, str(ROOT / "train.py"), "-m", *LONGER, "defense=none,security_vector", "sweep=sweep",
        "hydra.launcher.n_jobs=2", f"paths.cache={folder / 'cache'}", f"paths.outputs={folder}",
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def measured(folder: Path) -> dict[str, tuple[str, dict]]:
    records = json.loads((folder / "sweep" / "report.json").read_text())
    return {record["run"]: (record["status"], record["metrics"]) for record in records}


def test_a_multirun_killed_at_random_points_ends_in_the_same_report(tmp_path: Path) -> None:
    began = time.monotonic()
    assert multirun(tmp_path / "whole").wait(600) == 0
    seconds = time.monotonic() - began
    chance, kills = random.Random(0), 0
    for round in range(3):
        process = multirun(tmp_path / "cut")
        time.sleep(seconds * chance.uniform(0.1, 0.3))
        if process.poll() is not None:
            break
        kills += 1
        # the machine goes down, or the multirun alone: its jobs then go on, and the next one must not run them twice
        family = psutil.Process(process.pid).children(recursive=True) if round % 2 == 0 else []
        for member in [psutil.Process(process.pid), *family]:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait(60)
    assert kills >= 2
    assert multirun(tmp_path / "cut").wait(600) == 0, (tmp_path / "cut" / "log").read_text()[-3000:]
    whole, cut = measured(tmp_path / "whole"), measured(tmp_path / "cut")
    assert cut == whole and {status for status, _ in whole.values()} == {"completed"} and len(whole) == 2
