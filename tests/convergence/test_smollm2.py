"""A real pretrained LM through every stage, on a handful of samples. Needs `make smollm2`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from conftest import ROOT

from secvec.config.schema import RunConfig
from secvec.run import train

FOLDER = ROOT / "models" / "SmolLM2-135M-Instruct"


@pytest.mark.slow
@pytest.mark.skipif(not FOLDER.is_dir(), reason="run `make smollm2` first")
def test_every_stage_on_smollm2(make_config: Callable[..., RunConfig]) -> None:
    config = make_config(
        "experiment=smollm2", f"model.local_path={FOLDER}", "model.align.num_undesired=16", "model.align.num_benign=16",
        "model.align.gate=null", "model.align.epochs=1",
        "vector.num_samples=32", "vector.num_kl=16", "vector.epochs=3", "vector.gate.num_prompts=8",
        "vector.gate.min_behavior_rate=0.5", "data.num_harmful=16", "data.num_benign=16", "evaluation.num_prompts=8",
        small=False,
    )  # fmt: skip
    metrics = train(config)["metrics"]
    assert metrics["gate/behavior_rate"]["value"] > metrics["base/behavior_rate"]["value"]
    assert metrics["vector_on/behavior_loss"]["value"] < 0.5 * metrics["base/behavior_loss"]["value"]
    assert metrics["after/coherence_rate"]["value"] > 0.9
