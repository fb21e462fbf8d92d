"""A run that is cut off while it asks: the same command asks the rest, `force=true` asks everything."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import LEAKS

from secvec.config.schema import RunConfig
from secvec.evaluation import generation
from secvec.run import train


def test_the_same_command_asks_the_rest(make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls, stop_at = generation.generate, 0, -1

    def answer(*given: Any) -> Any:
        nonlocal calls
        if calls == stop_at:
            raise KeyboardInterrupt
        calls += 1
        return real(*given)

    def asked(config: RunConfig, stop: int = -1) -> tuple[int, dict[str, Any]]:
        nonlocal calls, stop_at
        calls, stop_at = 0, stop
        if stop < 0:
            return calls, train(config)
        with pytest.raises(KeyboardInterrupt):
            train(config)
        return calls, {}

    overrides = ("defense=none", "telemetry.every_n_steps=0", "evaluation.batch_size=8", LEAKS)
    train(make_config(*overrides, "stage=finetune", run="tuned"))
    runs = [make_config(*overrides, "stage=infer", run=name) for name in ("first", "whole", "cut")]
    for config in runs:
        shutil.copytree(Path(config.run_dir).parent / "tuned", config.run_dir)
    monkeypatch.setattr(generation, "generate", answer)
    first, whole, cut = runs
    asked(first)  # the base's answers are in the cache now
    _, record = asked(whole)
    every = calls
    kept = Path(cut.run_dir) / "answers"

    asked(cut, stop=2)
    assert kept.is_dir() and every > 3
    _, resumed = asked(cut)
    assert calls == every - 2 and resumed["metrics"] == record["metrics"] and not kept.exists()
    predictions = [Path(config.run_dir) / "predictions.jsonl" for config in (whole, cut)]
    assert predictions[0].read_bytes() == predictions[1].read_bytes()

    forced = cut.model_copy(update={"force": True})
    asked(forced, stop=2)
    assert kept.is_dir()
    asked(forced)
    assert calls == every
    assert record["generation"] == {"engine": "hf"}
