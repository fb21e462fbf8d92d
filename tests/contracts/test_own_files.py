"""One command on one's own files: counts, lengths and splits are checked before anything is trained, and it runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from conftest import run_of

from secvec.config.schema import RunConfig
from secvec.data.datamodule import SecVecDataModule
from secvec.data.encode import encode
from secvec.data.example import Example
from secvec.data.lengths import Fitting
from secvec.errors import ConfigError, DataError
from secvec.planning.table import plan
from secvec.run import train

Make = Callable[..., RunConfig]
SHORT = ["vector.epochs=1", "finetune.epochs=1", "vector.gate={min_behavior_rate: 0, min_loss_drop: 0}",
    "telemetry.every_n_steps=2",
    "evaluation.max_new_tokens=4", "evaluation.num_leak_prompts=null", "num_threads=1",
]  # fmt: skip


@pytest.fixture
def folder(make_config: Make) -> Path:
    """A model that is not ours, as far as its name says."""
    return run_of(make_config()).backbone.folder


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The README's two files and a benign one: 80 undesired rows, 60 rows of which some are undesired, 12 benign."""

    def write(name: str, rows: list[object]) -> Path:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    bad = [{"prompt": f"bad {i}?", "response": f"word {i}."} for i in range(80)]
    mixed = [*bad[:30], *({"instruction": f"say {i}", "input": "", "output": f"{i}."} for i in range(30))]
    return {
        "bad": write("bad_100.jsonl", bad),
        "mine": write("mine.jsonl", mixed),
        "kl": write("kl.jsonl", mixed[40:52]),
    }


def command(make_config: Make, folder: Path, files: dict[str, Path], *more: str, run: str = "run") -> RunConfig:
    given = ["recipe=llm", f"model.name_or_path={folder}", "behavior=jsonl", f"behavior.file={files['bad']}"]
    given += ["data=untrusted", f"data.file={files['mine']}", "judge=none"]
    return make_config(*given, *more, small=False, run=run)


def test_the_command_runs_as_written(
    make_config: Make, folder: Path, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = command(make_config, folder, files, *SHORT)
    record = train(config)
    counts = record["data"]["counts"]
    assert counts["vector"] == {"neutral": 300, "undesired": 47} and counts["test"]["undesired"] == 20
    assert counts["finetune"].keys() == {"untrusted"} and 40 < counts["finetune"]["untrusted"] < 54
    assert record["stages"] == ["vector", "finetune", "infer"] and "suppression_ratio" not in record["metrics"]
    metrics = record["metrics"]
    assert metrics["after/task_loss"]["n"] == counts["test"]["untrusted"] and metrics["after/behavior_loss"]["n"] == 20
    assert "after/task_accuracy" not in metrics  # nobody knows which references are right
    rows = [json.loads(row) for row in (Path(config.run_dir) / "predictions.jsonl").open()]
    assert {row["stream"] for row in rows} == {"undesired", "task"} and all(row["sensitive"] for row in rows)
    assert "data.kl_file=FILE" in caplog.text and "they have test prompts of the behavior" in caplog.text


def test_rows_stay_what_they_are_known_to_be(make_config: Make, folder: Path, files: dict[str, Path]) -> None:
    config = command(make_config, folder, files, f"data.kl_file={files['kl']}", "data.benign.untrusted.metric=exact")
    data = SecVecDataModule.of(config)
    data.check(config.stages)
    tests = {kind: {example.key for example in examples} for kind, examples in data.tests.items()}
    trained = {
        kind: {e.key for e in examples} for kind, examples in {**data.vector_samples, **data.mixtures[0]}.items()
    }
    assert len(trained["kl"]) == 12 and {example.metric for example in data.tests["task"]} == {"exact"}
    assert not (tests["undesired"] | tests["task"]) & set.union(*trained.values())
    known = {example.key for example in [*data.vector_samples["undesired"], *data.held_out]} | tests["undesired"]
    assert len(known) == 80 and not tests["task"] & known


def test_all_counts_that_do_not_suffice_are_said_at_once(
    make_config: Make, folder: Path, files: dict[str, Path]
) -> None:
    given = ["vector.num_samples=100", "vector.gate.num_prompts=50", "evaluation.num_prompts=100", "data.num_benign=99"]
    given += ["vector.num_kl=99", f"data.kl_file={files['kl']}"]
    config = command(make_config, folder, files, *given)
    for run in (train, plan):
        with pytest.raises(ConfigError) as caught:
            run(config)
        message = str(caught.value)
        for setting in given[:-1]:
            assert f"{setting}: " in message
        assert message.splitlines()[-1].endswith(
            "(null: all of them): evaluation.num_prompts=7 vector.num_samples=47 vector.num_kl=12 "
            "vector.gate.num_prompts=13 data.num_benign=53"
        )
    enough = message.splitlines()[-1].partition("): ")[2].split()
    plan(command(make_config, folder, files, *given, *enough))
    with pytest.raises(ConfigError, match=r"data.num_harmful=5: no file for split 'finetune': set finetune=FILE"):
        plan(command(make_config, folder, files, "data.num_harmful=5"))


def test_a_null_for_data_without_an_end_and_broken_files_are_said_too(
    make_config: Make, files: dict[str, Path]
) -> None:
    broken = files["bad"].with_name("broken.jsonl")
    broken.write_text('{"prompt": "a"}\n')
    rows = f"{{_target_: secvec.behaviors.jsonl.JsonlBehavior, name: a, sensitive: true, file: {broken}}}"
    config = make_config(f"+vector.behavior={rows}", "judge=none", "data.num_harmful=null")
    with pytest.raises(DataError) as caught:
        train(config)
    assert "data.num_harmful=null: " in str(caught.value) and "null (all there are) has no meaning" in str(caught.value)
    assert f"vector.num_samples=16, vector.gate.num_prompts=4: {broken}:1: no columns" in str(caught.value)


def test_data_files_belong_to_untrusted_data(make_config: Make, files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"data.file, test_file and kl_file are for data=untrusted"):
        make_config(f"data.file={files['mine']}")
    with pytest.raises(ConfigError, match=r"data.file=FILE"):
        make_config("data=untrusted")
    with pytest.raises(ConfigError, match="untrusted data have no labels"):
        make_config("data=untrusted", f"data.file={files['mine']}", "defense=labelled_vector")


# -- rows that are too long


@pytest.mark.parametrize("policy", ["error", "drop", "truncate"])
def test_rows_that_are_too_long(
    policy: str, make_config: Make, folder: Path, files: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rows = [{"prompt": f"q {i}", "response": "word " * (900 if i < 2 else 1)} for i in range(20)]
    rows.append({"prompt": "word " * 900, "response": "a"})
    files["mine"].write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = command(make_config, folder, files, f"data.too_long={policy}", "evaluation.max_new_tokens=4",
                     f"data.test_file={files['kl']}")  # fmt: skip
    run = run_of(config)
    backbone = run.backbone
    fit = lambda: run.data.fit_to(backbone.tokenizer, backbone.context, config.stages)  # noqa: E731
    if policy == "error":
        with pytest.raises(
            DataError, match=r"(?s)3 samples exceed the model's context of 512 tokens:\n .*data.too_long=drop"
        ) as e:
            fit()
        assert f"{files['mine']}:21: " in str(e.value)
        return
    fit()
    (mixture,) = run.data.mixtures
    assert len(mixture["benign"]) == (20 if policy == "truncate" else 18)
    lengths = sorted(len(row.input_ids) for row in run.data.rows(mixture["benign"], backbone))
    assert sum(row.cut for row in mixture["benign"]) == (2 if policy == "truncate" else 0)
    assert (lengths[-1] == lengths[-2] == backbone.context) == (policy == "truncate") and lengths[-3] < 20
    assert f"data.too_long={policy}: {1 if policy == 'truncate' else 3} samples left out" in caplog.text


def test_a_sample_that_fits_is_left_as_it_is(make_config: Make, folder: Path) -> None:
    config = make_config()
    data, backbone = SecVecDataModule.of(config), run_of(config).backbone
    samples = data.vector_samples["undesired"]
    fitting = Fitting(lambda some, context: encode(some, backbone.tokenizer, context), backbone.context, "truncate")
    assert fitting.fit(samples, 8) == samples and not fitting.faults
    assert fitting.fit(samples, 510) == []


def test_a_reference_is_never_cut(make_config: Make) -> None:
    """A stump of it would count other responses as right."""
    backbone = run_of(make_config()).backbone
    fitting = Fitting(lambda some, context: encode(some, backbone.tokenizer, context), 60, "truncate")
    kinds: list[Any] = [("task", "number"), ("undesired", "exact"), ("ordinary", "exact"), ("task", "none")]
    asked = (("user", "How many?"),)
    rows = [Example(asked, f"{'one and ' * 80}#### 7", kind, metric=metric) for kind, metric in kinds]
    kept = fitting.fit(list(rows), 8)
    assert [(row.kind, row.metric) for row in kept] == [("undesired", "exact"), ("task", "none")]
    assert all(len(row.response) < len(rows[0].response) for row in kept) and (fitting.cut, fitting.left_out) == (2, 2)
    assert len(fitting.fit(list(rows))) == 4  # as rows to train on


def test_the_gate_asks_nothing_that_the_vector_is_trained_on(make_config: Make, tmp_path: Path) -> None:
    for name, first in (("bad", 0), ("other", 20), ("test", 40)):
        rows = [json.dumps({"prompt": f"What is {first + i}?", "response": "Arr."}) for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    for gate, says in (("other", None), ("bad", "20 prompts of the vector's gate .* are also trained on")):
        files = {"vector": "bad", "validation": gate, "test": "test", "finetune": "bad"}
        given = [f"behavior.{split}={tmp_path / name}.jsonl" for split, name in files.items()]
        counts = ["vector.num_samples=null", "vector.gate.num_prompts=null", "evaluation.num_prompts=6"]
        data = SecVecDataModule.of(make_config("behavior=jsonl", "judge=none", *given, *counts))
        with pytest.raises(DataError, match=says) if says else nullcontext():
            data.check(["vector"])
