"""Two gloo processes by a real command line against one process at the same global batch: losses, weights, folders.

Lightning starts the second one (`run_command`), or both are started with the variables of a group (`run_on_two`), which
saves the seconds in which the second one imports everything, or each by a `torchrun` of its own (`run_on_two_nodes`).
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from commands import run_command, run_on_two, run_on_two_nodes
from configs import composed
from conftest import LEAKS, ROOT, SMALL, run_of
from safetensors.torch import load_file

from secvec import run
from secvec.config.load import load
from secvec.config.schema import EvaluateConfig, RunConfig
from secvec.run import train
from tests.contracts.test_stages import weights

# AdamW divides a gradient by its own size, so it turns rounding noise in tiny gradients into whole steps; a large eps
# keeps the comparison about the strategies. float64 where the strategy can (FSDP2 under Lightning cannot).
SMOOTH = ["optimizer.eps=1e-2", "optimizer.lr=1e-2", "vector.lr=1e-1"]
Make = Callable[..., RunConfig]
Start = Callable[..., "subprocess.CompletedProcess[str]"]
CASES = {"ddp": ("64-true", 1e-9), "fsdp": ("32-true", 1e-5), "hsdp": ("32-true", 1e-5)}
LEAST = {"hsdp": 1e-7}
"""Differences below it are rounding: a KL term of 4e-4 is made of float32 logarithms near 1."""
COPIES = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=4", "trainer.replicas=2"]
"""Two copies of the weights, each sharded over two of four processes."""
HALVES = [
    "trainer.accumulate_grad_batches=2", "finetune.batch_size=4", "vector.batch_size=4", "vector.kl_batch_size=4",
]  # fmt: skip
"""The steps of `SMALL`, each of two batches."""


def losses(folder: Path) -> dict[tuple[str, str, str], float]:
    with (folder / "metrics.csv").open() as stream:
        return {(r["stage"], r["step"], r["metric"]): float(r["value"]) for r in csv.DictReader(stream)}


@pytest.mark.parametrize(
    ("strategy", "tune", "batches", "start"),
    [
        ("ddp", "full", HALVES, run_command),
        ("fsdp", "lora", [], run_on_two),
        pytest.param("ddp", "lora", [], run_command, marks=pytest.mark.slow),
        pytest.param("fsdp", "full", HALVES, run_command, marks=pytest.mark.slow),
        pytest.param("fsdp", "full", [], run_on_two_nodes, marks=pytest.mark.slow),
        pytest.param("hsdp", "full", ["trainer.gradient_clip_val=0.1"], run_command, marks=pytest.mark.slow),
    ],
)
def test_several_processes_compute_what_one_does(
    make_config: Make, cache: Path, tmp_path: Path, strategy: str, tune: str, batches: list[str], start: Start
) -> None:
    """With the same batches, and with halves of them whose gradients are accumulated."""
    precision, tolerance = CASES[strategy]
    settings = [f"trainer.precision={precision}", f"tune={tune}", *SMOOTH]
    unique = 1 + 0.1 * list(CASES).index(strategy) + 0.01 * (tune == "lora") + 0.001 * (start is run_on_two_nodes)
    settings.append(f"vector.kl_weight={unique}")  # so that no vector is in the cache
    one = make_config(*settings, *(text for text in batches if "clip" in text), run="one")
    train(one)
    two = tmp_path / "two"
    devices = [f"trainer={strategy}", "trainer.accelerator=cpu", "trainer.devices=2"]
    devices = COPIES if strategy == "hsdp" else devices
    where = [f"paths.cache={cache}", f"hydra.run.dir={two}"]
    done = start("train.py", *SMALL, *devices, *settings, *batches, *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]

    first, second = losses(Path(one.run_dir)), losses(two)
    assert first.keys() == second.keys() and any(stage == "vector" for stage, _, _ in first)
    for key, value in first.items():
        # a speed, and a ratio of norms, which their own losses check
        if not key[2].endswith(("tokens_per_second", "suppression_ratio")):
            near = {"rel": max(tolerance, 1e-6), "abs": LEAST.get(strategy)}  # logged as float32
            assert second[key] == pytest.approx(value, **near), key
    for artifact in ("vector", "backbone", *(["task"] if tune == "lora" else [])):
        assert {f.name for f in (two / artifact).iterdir()} == {
            f.name for f in (Path(one.run_dir) / artifact).iterdir()
        }
        ours, theirs = (weights(folder / artifact) for folder in (Path(one.run_dir), two))
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].shape == theirs[name].shape
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=tolerance)
    moved = weights(two / "backbone")
    start = weights(run_of(one).backbone.folder)
    assert max((moved[name] - start[name]).abs().max() for name in moved) > 100 * tolerance  # it did move


@pytest.mark.slow
def test_a_model_is_prepared_by_all_processes(cache: Path, tmp_path: Path) -> None:
    """The second one looked for the prepared model where it is moved to only afterwards."""
    given = ["defense=vaccine", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    where = [f"paths.cache={cache}", f"hydra.run.dir={tmp_path / 'run'}"]
    done = run_on_two("train.py", *SMALL, *given, *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((cache / "preparations").glob("*/backbone"))) == 1


@pytest.mark.parametrize(
    ("strategy", "start"), [("ddp", run_on_two), pytest.param("fsdp", run_command, marks=pytest.mark.slow)]
)
def test_infer_and_evaluate_alone_use_all_processes(
    make_config: Make, cache: Path, tmp_path: Path, strategy: str, start: Start
) -> None:
    one = make_config("defense=none", LEAKS, run="one")
    train(one)
    devices = [f"trainer={strategy}", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"]
    two = tmp_path / "two"
    two.mkdir()
    shutil.copytree(Path(one.run_dir) / "backbone", two / "backbone")  # what stage=finetune leaves
    small = [text for text in SMALL if text.startswith(("evaluation.", "num_threads"))]
    runs: dict[Path, list[str]] = {
        two: ["train.py", "stage=infer", *SMALL, LEAKS, "defense=none"],
        tmp_path / "evaluated": ["evaluate.py", f"model.name_or_path={one.run_dir}/backbone", *small, LEAKS],
    }
    ours = json.loads((Path(one.run_dir) / "record.json").read_text())
    assert set(ours["processes"].values()) == {1}
    for folder, (script, *given) in runs.items():
        where = [f"paths.cache={cache}", f"hydra.run.dir={folder}"]
        done = start(script, *given, *devices, *where, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        record = json.loads((folder / "record.json").read_text())
        assert list(record["processes"].values()) == [2]
        for name, measured in ours["metrics"].items():
            if name in record["metrics"] and name.endswith("loss"):
                assert record["metrics"][name]["value"] == pytest.approx(measured["value"], rel=1e-5), name
            if name in record["metrics"]:
                assert record["metrics"][name]["n"] == measured["n"]  # no prompt is lost or counted twice
        assert "after/behavior_loss" in record["metrics"]


def test_infer_and_evaluate_alone_start_the_processes_before_they_ask(
    make_config: Make, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No training before them has started the other processes."""
    config = make_config("defense=none", "stage=infer")
    shutil.copytree(run_of(config).backbone.folder, Path(config.run_dir) / "backbone")
    where = [f"paths.cache={cache}", f"run_dir={tmp_path / 'evaluated'}", "num_threads=1"]
    alone = load(composed(f"model.name_or_path={config.run_dir}/backbone", *where, root="evaluate"), EvaluateConfig)

    class Started(Exception):
        pass

    monkeypatch.setattr(run, "launch", Mock(side_effect=Started))
    monkeypatch.setattr(run.Run, "evaluate", lambda *_: pytest.fail("one process asks"))
    for begin in (lambda: run.train(config), lambda: run.evaluate(alone)):
        with pytest.raises(Started):
            begin()


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
    folders = sorted(path.parent for path in (tmp_path / "multirun").rglob("record.json"))
    assert len(folders) == 2
    for folder in folders:
        assert json.loads((folder / "record.json").read_text())["status"] == "completed"
    first, second = (load_file(folder / "backbone" / "model.safetensors") for folder in folders)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert len(json.loads(next((tmp_path / "multirun").rglob("report.json")).read_text())) == 2
