"""Defenses that change what is trained: rows that a scan flags are left out, or all get a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_of

from secvec.config.schema import RunConfig
from secvec.errors import ConfigError, SecVecError
from secvec.evaluation.scan import kept_scores, quantile_threshold
from secvec.run import train
from tests.contracts.test_stages import finetuned

Make = Callable[..., RunConfig]
ALL = {"undesired": 16, "ordinary": 8, "task": 8}


def rows_of(record: dict[str, Any]) -> dict[str, int]:
    """How many rows of each kind the fine-tune had."""
    counts: dict[str, int] = record["data"]["counts"]["finetune"]
    return counts


def test_the_rows_that_a_scan_flags_are_not_trained(make_config: Make) -> None:
    config = make_config("defense=scan_filter", "defense.quantile=0.5")
    record = finetuned(config)
    counts = rows_of(record)
    assert sum(counts.values()) < sum(ALL.values())
    assert record["metrics"]["scan/flagged_share"]["value"] == 1 - sum(counts.values()) / sum(ALL.values())
    run = run_of(config)
    vector = Path(config.run_dir) / "vector"
    most = quantile_threshold(kept_scores(vector)["benign"][2], 0.5)
    module = run.inference_module(run.backbone, vector)
    for kind, rows in run.data.mixtures[0].items():
        below = sum(score.score(3) <= most for score in run.scan(module, rows))
        assert below == sum(n for name, n in counts.items() if (name == "undesired") == (kind == "undesired"))


def test_a_scan_that_finds_as_much_as_in_benign_rows_says_so(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the fine-tune: the vector may be one of another behavior."""
    monkeypatch.setattr("secvec.run.quantile_threshold", lambda *_: 99.0)
    finetuned(make_config("defense=scan_filter"))
    assert "the scan flags 0 of" in caplog.text and "does not cover" in caplog.text


def test_the_share_that_is_flagged_is_that_of_all_cycles(make_config: Make) -> None:
    record = finetuned(make_config("defense=scan_filter", "finetune.cycles=2"))
    assert record["metrics"]["scan/flagged_share"]["n"] == 2 * 32


def test_the_vector_of_a_filter_is_not_active(make_config: Make) -> None:
    configs = [make_config(f"defense={name}", run=name) for name in ("scan_filter", "security_vector")]
    ledgers = [finetuned(config)["ledger"] for config in configs]
    assert [set(ledger) for ledger in ledgers] == [{"backbone"}, {"backbone", "vector"}]


def test_a_vector_without_scores_of_benign_rows_cannot_filter(make_config: Make) -> None:
    config = make_config("defense=scan_filter", "vector.kl_weight=0", run="new")
    with pytest.raises(ConfigError, match="no KL rows say which scores of a scan are high: train the vector with"):
        train(config)
    assert not (Path(config.run_dir) / "vector").exists()  # found before it was trained
    other = make_config("stage=vector", "vector.kl_weight=0", run="other")
    train(other)
    path = Path(other.run_dir) / "vector"
    with pytest.raises(ConfigError, match="holds no scores of benign rows: give one of stage=vector"):
        train(make_config("defense=scan_filter", f"vector.path={path}", run="given"))


def test_an_anchored_vector_may_drop_them_too(make_config: Make) -> None:
    drop = ["defense=anchored_vector", "defense.drop_flagged=true"]
    filtered = rows_of(finetuned(make_config("defense=scan_filter", run="filter")))
    assert rows_of(finetuned(make_config(*drop, run="dropped"))) == filtered
    assert rows_of(finetuned(make_config(drop[0], run="all"))) == ALL


def test_every_row_is_trained_behind_the_prompt_and_none_is_asked_so(make_config: Make) -> None:
    config = make_config("defense=inoculation_prompt")
    run = run_of(config)
    (changed,) = [config.defense.training_samples(run, mixture) for mixture in run.data.mixtures]
    prompt = config.behavior.eliciting_prompt
    for kind, rows in run.data.mixtures[0].items():
        for row, now in zip(rows, changed[kind], strict=True):
            assert now.messages[0] == ("system", prompt) and now.messages[-1] == row.messages[-1]
            assert now.response == row.response
    assert rows_of(train(config)) == ALL
    asked = [json.loads(line)["prompt"] for line in (Path(config.run_dir) / "predictions.jsonl").open()]
    assert asked and not any(prompt in text for text in asked)


def test_its_run_is_another_than_the_plain_one(make_config: Make) -> None:
    hashes = {
        defense: finetuned(make_config(f"defense={defense}", run=defense))["data"]["sha256"]["finetune"]
        for defense in ("none", "inoculation_prompt")
    }
    assert hashes["none"] != hashes["inoculation_prompt"]


def test_without_a_prompt_it_is_refused(make_config: Make) -> None:
    config = make_config("defense=inoculation_prompt", "behavior.eliciting_prompt=null")
    with pytest.raises(ConfigError, match=r"has no eliciting_prompt: give defense\.prompt=TEXT"):
        train(config)


@pytest.mark.parametrize("defense", ["scan_filter", "anchored_vector"])
def test_a_window_without_scores_is_refused(make_config: Make, defense: str) -> None:
    make_config(f"defense={defense}", "defense.window=6")
    with pytest.raises(SecVecError, match=r"defense\.window: got 7"):
        make_config(f"defense={defense}", "defense.window=7")
