"""A backbone of the user's own that is to be aligned first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_of

from secvec.config.schema import RunConfig
from secvec.data.embedded import Ordinary
from secvec.errors import GateError
from secvec.models.backbone import fingerprint
from secvec.models.tiny import build_tiny
from tests.contracts.test_stages import same, weights


def test_given_weights_are_aligned_in_the_cache_and_stay_as_they_are(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    texts = [text for e in Ordinary().examples("align", 100, 0) for text in (e.prompt, e.response)]
    for part in build_tiny(texts, 0):
        part.save_pretrained(tmp_path / "mine")
    before = fingerprint(tmp_path / "mine")
    recipe = "{num_undesired: 8, num_benign: 8, epochs: 1, batch_size: 16, lr: 1e-3, seed: 0}"
    config = make_config(
        "model=hf", "recipe=tiny", f"model.name_or_path={tmp_path / 'mine'}", f"+model.align={recipe}", "num_threads=1",
        f"paths.cache={tmp_path / 'cache'}", small=False,
    )  # fmt: skip
    base = run_of(config).backbone
    assert fingerprint(tmp_path / "mine") == before != base.fingerprint
    assert base.folder.is_relative_to(tmp_path / "cache")
    assert run_of(config).backbone.fingerprint == base.fingerprint


def test_a_base_that_is_not_aligned_well_is_refused_and_kept(
    make_config: Callable[..., RunConfig], tmp_path: Path
) -> None:
    own = f"paths.cache={tmp_path / 'own'}"

    def gate(behavior: float, retained: float) -> str:
        kinds = f"max_behavior_rate: {behavior}, min_wanted_rate: 0, min_retained_accuracy: {retained}"
        return f"model.align.gate={{num_prompts: 8, {kinds}}}"

    with pytest.raises(GateError, match="failed its gate") as caught:
        run_of(make_config(own, gate(0.0, 1.0))).backbone  # noqa: B018
    assert "model.align.gate.min_retained_accuracy=100.0%" in str(caught.value)
    lenient = run_of(make_config(own, gate(1.0, 0.0))).backbone  # measured once, judged by what is wanted now
    assert str(lenient.folder) in str(caught.value)
    (measured,) = (tmp_path / "own" / "answers").glob("*.json")
    probe = json.loads(measured.read_text())
    probe["metrics"]["base gate/behavior_rate"]["value"] = 0.5
    measured.write_text(json.dumps(probe))
    with pytest.raises(GateError, match=r"shows the behavior on 50\.0% of 8 held-out prompts"):
        run_of(make_config(own, gate(0.02, 0.0))).backbone  # noqa: B018


def test_a_base_is_that_of_one_precision(make_config: Callable[..., RunConfig]) -> None:
    folders = [run_of(make_config(f"trainer.precision={one}")).backbone.folder for one in ("32-true", "bf16-mixed")]
    assert folders[0] != folders[1] and not same(*map(weights, folders))


def test_a_base_is_that_of_one_way_to_pad(make_config: Callable[..., RunConfig]) -> None:
    """The losses differ by rounding, which a thousand steps make visible."""
    folders = [run_of(make_config(f"model.packing={one}")).backbone.folder for one in ("true", "false")]
    assert folders[0] != folders[1]
