"""Two gloo processes by a real command line against one process at the same global batch: losses, weights, folders."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL
from safetensors.torch import load_file

from secvec.config.load import RunConfig
from secvec.run import train
from secvec.stages.align import base_for

# AdamW divides a gradient by its own size, so it turns rounding noise in tiny gradients into whole steps; a large eps
# keeps the comparison about the strategies. float64 where the strategy can (FSDP2 under Lightning cannot).
SMOOTH = ["optimizer.eps=1e-2", "optimizer.lr=1e-2", "vector.lr=1e-1"]
CASES = {"ddp": ("64-true", 1e-9), "fsdp": ("32-true", 1e-5)}


def losses(folder: Path) -> dict[tuple[str, str, str], float]:
    with (folder / "metrics.csv").open() as stream:
        return {(r["stage"], r["step"], r["metric"]): float(r["value"]) for r in csv.DictReader(stream)}


@pytest.mark.parametrize("strategy", CASES)
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_two_processes_compute_what_one_does(
    make_config: Callable[..., RunConfig], cache: Path, tmp_path: Path, strategy: str, tune: str
) -> None:
    precision, tolerance = CASES[strategy]
    settings = [f"trainer.precision={precision}", f"tune={tune}", *SMOOTH]
    unique = 1 + 0.1 * list(CASES).index(strategy) + 0.01 * (tune == "lora")  # so that no vector is in the cache
    settings.append(f"vector.kl_weight={unique}")
    one = make_config(*settings, run="one")
    train(one)
    two = tmp_path / "two"
    command = [
        sys.executable, str(ROOT / "train.py"), *SMALL, f"trainer={strategy}", "trainer.accelerator=cpu",
        "trainer.devices=2", *settings, f"paths.cache={cache}", f"hydra.run.dir={two}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]

    first, second = losses(Path(one.run_dir)), losses(two)
    assert first.keys() == second.keys() and any(stage == "vector" for stage, _, _ in first)
    for key, value in first.items():
        if "suppression" not in key[2]:  # a ratio of norms: checked by the norms' own losses
            assert second[key] == pytest.approx(value, rel=max(tolerance, 1e-6)), key  # logged as float32
    for artifact in ("vector", "backbone", *(["task"] if tune == "lora" else [])):
        assert {f.name for f in (two / artifact).iterdir()} == {
            f.name for f in (Path(one.run_dir) / artifact).iterdir()
        }
        ours, theirs = (
            load_file(next((folder / artifact).glob("*.safetensors"))) for folder in (Path(one.run_dir), two)
        )
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].shape == theirs[name].shape
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance)
    moved = load_file(next((two / "backbone").glob("*.safetensors")))
    start = load_file(next(base_for(one).folder.glob("*.safetensors")))
    assert max((moved[name] - start[name]).abs().max() for name in moved) > 100 * tolerance  # it did move


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [["hydra.launcher.n_jobs=2"], ["hydra/launcher=slurm", "hydra.launcher.cluster=local"]], ids=str
)
def test_distributed_jobs_of_a_multirun_run_side_by_side(cache: Path, tmp_path: Path, launcher: list[str]) -> None:
    """Each with a process group, a port and a folder of its own; what surrounds the multirun does not reach them."""
    command = [
        sys.executable, str(ROOT / "train.py"), "-m", *SMALL, *launcher, "trainer=ddp", "trainer.accelerator=cpu",
        "trainer.devices=2", "defense=none", "seed=0,1", f"paths.cache={cache}", f"paths.outputs={tmp_path}",
    ]  # fmt: skip
    around = {**os.environ, "MASTER_PORT": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=500, env=around)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    folders = sorted(path.parent for path in (tmp_path / "multirun").glob("*/record.json"))
    assert len(folders) == 2
    for folder in folders:
        assert json.loads((folder / "record.json").read_text())["status"] == "completed"
    first, second = (load_file(folder / "backbone" / "model.safetensors") for folder in folders)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert len(json.loads((tmp_path / "multirun" / "report.json").read_text())) == 2
