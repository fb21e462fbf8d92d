"""Defenses that act on the step, on two gloo processes against one: the same weights, also after a resume."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from commands import ROOT, run_command

from secvec.defenses.base import Defense
from tests.distributed.defenses_on_two import DEFENSES, train


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}  # of the process that Lightning starts
    done = run_command("tests/distributed/defenses_on_two.py", str(tmp_path), cwd=tmp_path, env=paths)
    assert done.returncode == 0, done.stderr[-3000:]
    plain = train(Defense(name="none"), tmp_path, None)
    for defense in DEFENSES:
        one = train(defense, tmp_path, None)
        apart = max(float((one[name] - plain[name]).abs().max()) for name in one)
        for strategy in ("ddp", "fsdp"):
            two = torch.load(tmp_path / f"{defense.name}-{strategy}.pt", weights_only=True)
            assert two.keys() == one.keys()
            differ = max(float((one[name] - two[name]).abs().max()) for name in one)
            assert differ < min(1e-5, apart / 10), (defense.name, strategy, differ, apart)
