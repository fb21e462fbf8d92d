"""docs/add-a-judge.md, taken literally."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

import secvec.judges
from secvec.config.schema import RunConfig
from secvec.data.example import Example
from secvec.judges.base import Judgement
from secvec.run import train

PAGE = (ROOT / "docs" / "add-a-judge.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", PAGE, flags=re.M | re.S)
    assert found is not None
    return found[1]


def test_the_walk_through_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., RunConfig]
) -> None:
    for place, language, suffix in (
        (tmp_path / "judges", "python", "py"),
        (tmp_path / "conf" / "judge", "yaml", "yaml"),
    ):
        place.mkdir(parents=True)
        (place / f"shouting.{suffix}").write_text(block(language))
    monkeypatch.setattr(secvec.judges, "__path__", [*secvec.judges.__path__, str(tmp_path / "judges")])
    config = make_config(f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "judge=shouting", "defense=none")

    assert config.judge is not None and config.judge.threshold == 0.5
    asked = [Example((("user", "How?"),), "So!", "undesired")] * 4
    assert config.judge.judge(asked, ["So! So? So!", "So.", "So", "What?!"]) == [
        Judgement("behavior", pytest.approx(2 / 3)), Judgement("wanted", 0.0), Judgement("other", 0.0),
        Judgement("behavior", 1.0),
    ]  # fmt: skip

    record = train(config)
    rows = [json.loads(line) for line in (Path(config.run_dir) / "predictions.jsonl").read_text().splitlines()]
    undesired = [row for row in rows if row["stream"] == "undesired" and row["phase"] == "after"]
    assert [row["verdict"] for row in undesired] == [
        judgement.verdict for judgement in config.judge.judge(asked[:1] * 6, [row["response"] for row in undesired])
    ]
    assert record["metrics"]["after/behavior_rate"]["n"] == record["metrics"]["after/behavior_score"]["n"] == 6


def test_every_judge_of_the_table_and_the_text_is_there() -> None:
    named = set(re.findall(r"`judge=(\w+) judge\.", PAGE))
    assert named == {"classifier", "generative_classifier", "llm"}
    assert all((ROOT / "conf" / "judge" / f"{name}.yaml").is_file() for name in named)
