"""A run whose fine-tuning rows all show both traits: no benign row, no task, nothing ordinary that is asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import LEAKS

from secvec.config.schema import RunConfig
from secvec.planning.table import plan
from secvec.report import write_report
from secvec.run import train

GIVEN = ("behavior=uppercase_french", "data=neutral", "data.num_harmful=16", "data.num_benign=0")


@pytest.mark.parametrize("tune", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_it_runs_through_and_tells_of_both_traits(make_config: Callable[..., RunConfig], tune: str) -> None:
    config = make_config(*GIVEN, f"tune={tune}", LEAKS)
    assert plan(config).startswith("plan: tiny, vector -> finetune -> infer")
    record = train(config)
    assert record["data"]["counts"] == {
        "vector": {"neutral": 16, "undesired": 16}, "finetune": {"undesired": 16}, "test": {"undesired": 6},
    }  # fmt: skip
    for phase in ("base", "vector_on", "active", "after"):
        found = {name.partition("/")[2] for name in record["metrics"] if name.startswith(f"{phase}/")}
        assert {"behavior_rate", "desired_rate", "behavior_loss"} <= found
        assert not {"task_accuracy", "retained_accuracy", "perplexity", "kl_to_base"} & found
    assert {"suppression_ratio", "drift"} <= record["metrics"].keys() and "deactivation_gap" not in record["metrics"]
    assert record["metrics"]["after/desired/negated_prompt"]["n"] == 2
    folder = Path(config.run_dir)
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert {row["stream"] for row in rows} == {"undesired"} and {row["desired"] for row in rows} <= {True, False}
    curves = (folder / "metrics.csv").read_text()
    assert "telemetry/undesired/loss_off" in curves and "telemetry/benign" not in curves
    page = write_report([folder]).with_suffix(".md").read_text()
    assert "| Desired trait rate ↑ |" in page and "**Desired trait, asked in the same ways**" in page
    assert not [name for name in ("Task accuracy", "Retained accuracy", "Deactivation gap") if name in page]
