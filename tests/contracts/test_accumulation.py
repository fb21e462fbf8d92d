"""Gradients accumulated over small batches are those of one large batch, whatever the lengths of the answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_of

from secvec.config.schema import RunConfig
from secvec.data.datamodule import GlobalBatchSampler
from secvec.errors import ConfigError
from secvec.run import train
from tests.contracts.test_stages import weights

EXACT = [
    "trainer.precision=64-true",
    "optimizer=sgd",
    "optimizer.lr=0.05",
    "scheduler=constant",
    "telemetry.every_n_steps=0",
    "vector.lr=0.5",
    "vector.epochs=1",
    "finetune.epochs=1",
    "vector.kl_weight=0.37",
]


@pytest.mark.parametrize("defense", ["none", "labelled_vector", "anchored_vector"])
def test_small_batches_accumulated_are_one_large_batch(make_config: Callable[..., RunConfig], defense: str) -> None:
    large = make_config(f"defense={defense}", *EXACT, run="large")
    extra = ["defense.extra_batch_size=2"] if defense == "anchored_vector" else []  # 8 in a step, as in the large batch
    small = make_config(
        f"defense={defense}", *EXACT, "trainer.accumulate_grad_batches=4", "finetune.batch_size=2",
        "vector.batch_size=2", "vector.kl_batch_size=2", *extra, run="small",
    )  # fmt: skip
    base = run_of(large).backbone
    parts = ["vector", "backbone"] if defense != "none" else ["backbone"]
    for config in (large, small):
        for stage in ["vector", "finetune"][-len(parts) :]:
            train(config.model_copy(update={"stage": stage}))
    for part in parts:
        ours, theirs = (weights(Path(config.run_dir) / part) for config in (small, large))
        start = weights(base.folder)
        apart = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
        assert apart < 1e-9, part
        if part == "backbone":
            assert max(float((theirs[name] - start[name]).abs().max()) for name in theirs) > 1e-3  # it did move


@pytest.mark.parametrize("rows", [48, 50, 47])
def test_a_step_has_the_rows_of_one_large_batch(rows: int) -> None:
    large = list(GlobalBatchSampler([rows, 9], [16, 8], 0))
    small = list(GlobalBatchSampler([rows, 9], [4, 2], 0, accumulate=4))
    assert len(small) == 4 * len(large)
    for step, batch in enumerate(large):
        assert sorted(i for part in small[4 * step : 4 * step + 4] for i in part) == sorted(batch)


def test_batches_too_small_to_be_shared_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a smaller trainer\.accumulate_grad_batches"):
        GlobalBatchSampler([6], [2], 0, accumulate=8)


def test_a_callback_cannot_change_it(make_config: Callable[..., RunConfig]) -> None:
    target = "lightning.pytorch.callbacks.GradientAccumulationScheduler"
    with pytest.raises(ConfigError, match=r"callbacks\.more: .* set the Trainer's accumulate_grad_batches"):
        make_config(f"+callbacks.more={{_target_: {target}, scheduling: {{0: 2}}}}")
