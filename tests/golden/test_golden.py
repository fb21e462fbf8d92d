"""Twenty steps of each stage on the tiny model give the losses of version 0.1, whatever was restructured since.

`losses.json` was written by version 0.1 (commit e0caecf) from these settings. The schedule is constant, because that of
version 0.1 computed its cosine in float32. On the machine that wrote it the losses were the same to the last bit; the
tolerance is for other processors.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, run_of

from secvec.config.schema import RunConfig
from secvec.module import SecVecModule
from secvec.run import train

KEPT = json.loads((Path(__file__).parent / "losses.json").read_text())
SETTINGS = [
    *SMALL, "model.align.num_undesired=160", "model.align.num_benign=160", "vector.num_samples=60", "vector.num_kl=24",
    "vector.epochs=4", "vector.batch_size=12", "vector.kl_batch_size=12", "data.num_harmful=120", "data.num_benign=120",
    "finetune.epochs=1", "finetune.batch_size=12", "telemetry.every_n_steps=5", "scheduler=constant",
]  # fmt: skip
CASES = {
    "security_vector": [], "none": ["defense=none"],
    "dropout": ["vector=dropout", "model.packing=false"],  # without padding, dropout draws fewer numbers
}  # fmt: skip


def test_losses_of_the_alignment_are_kept(
    make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this version: 0.1 kept none. 20 steps that teach the tiny model to refuse, before the other stages."""
    torch.set_num_threads(1)
    losses: list[float] = []
    step = SecVecModule.training_step

    def kept_step(self: SecVecModule, *given: Any) -> torch.Tensor:
        loss = step(self, *given)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(SecVecModule, "training_step", kept_step)
    twenty = ["model.align.epochs=1", "model.align.batch_size=16", f"paths.cache={tmp_path / 'empty'}"]
    assert run_of(make_config(*SETTINGS, *twenty, small=False)).backbone.folder.is_dir()
    assert len(losses) == 20 and losses[-1] < losses[0] - 1
    assert losses == pytest.approx(KEPT["align"], rel=1e-4)


@pytest.mark.parametrize("case", ["security_vector", "none", pytest.param("dropout", marks=pytest.mark.slow)])
def test_losses_are_those_of_version_0_1(make_config: Callable[..., RunConfig], tmp_path: Path, case: str) -> None:
    torch.set_num_threads(1)
    train(make_config(*SETTINGS, *CASES[case], small=False))
    curves: dict[str, list[float]] = {}
    files = [tmp_path / "run" / "metrics.csv"]
    for file in files:
        with file.open() as stream:
            for row in csv.DictReader(stream):
                if row["metric"] in ("train/loss", "train/ce", "train/kl"):
                    curves.setdefault(f"{row['stage']}/{row['metric']}", []).append(float(row["value"]))
    kept = KEPT[case]
    assert curves.keys() == kept.keys() and all(len(values) == 20 for values in kept.values())
    for name, values in kept.items():
        assert values[0] != values[-1]  # it learns something
        # a small KL is a difference of numbers near 1: what another processor rounds (1.7e-6) is absolute
        assert curves[name] == pytest.approx(values, rel=1e-4, abs=5e-6), name
