"""What a tracker shows is what the run folder holds: W&B offline read back, TensorBoard files, metrics.csv."""

from __future__ import annotations

import csv
import json
import logging
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import LEAKS, SMALL
from wandb.util import get_core_path

from secvec.config.schema import AnyConfig, EvaluateConfig, RunConfig
from secvec.errors import GateError
from secvec.run import evaluate, train
from secvec.settings.conf import CONF
from secvec.tracking.base import flat
from secvec.tracking.dashboard import as_json
from secvec.training.callbacks import TrainingMetrics
from secvec.training.optim import build_schedule

Points = set[tuple[str, float, float]]  # (name, step, value)


def in_csv(folder: Path) -> Points:
    with (folder / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["stage"] != "outcomes"]
    return {(f"{r['stage']}/{r['metric']}", float(r["step"]), round(float(r["value"]), 5)) for r in rows}


def log_of(folder: Path) -> Path:
    return next((folder / "wandb").glob("offline-run-*/*.wandb"))


def inspect(folder: Path, *how: str) -> str:
    """By the program that `wandb leet inspect` calls: a second less each time than by way of Python."""
    command = [get_core_path(), "leet", "inspect", *how, "--json", "--no-observability", "--run-file"]
    command += [str(log_of(folder)), str(folder / "wandb")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def summary_of(folder: Path) -> dict[str, Any]:
    """Once W&B has written the end, which on a busy machine comes after its `finish`."""
    for _ in range(50):
        found: dict[str, Any] = json.loads(inspect(folder, "--summary"))
        if found["state"] != "running":
            break
        time.sleep(0.2)
    return found


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in inspect(folder).splitlines()]
    return [row[kind] for row in rows if row["type"] == kind]


def table(folder: Path, shown: dict[str, Any]) -> list[dict[str, Any]]:
    held = json.loads((log_of(folder).parent / "files" / shown["path"]).read_text())
    return [dict(zip(held["columns"], row, strict=True)) for row in held["data"]]


def predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_wandb_offline_holds_what_the_run_folder_holds(make_config: Callable[..., RunConfig]) -> None:
    # at this rate no other test trains a vector: one from the cache would have no curves
    config = make_config("logger=wandb", "sweep=mysweep", "logger.wandb.num_predictions=2", "vector.lr=0.00401", LEAKS)
    record = train(config, ["seed=0", "vector.epochs=2", "sweep=mysweep"])
    folder = Path(config.run_dir)
    shown = summary_of(folder)
    summary = shown["summary"]

    begun = records(folder, "run")[0]
    assert (begun["display_name"], begun["run_group"], begun["job_type"]) == (
        "seed=0 vector.epochs=2",
        "mysweep",
        "all",
    )
    assert set(shown["tags"]) == {"forbidden_recipe", "security_vector", "tiny"}
    assert shown["state"] == "finished" and shown["run_id"].startswith(record["key"])
    settings = flat(shown["config"])
    assert settings.items() >= flat(record["config"]).items() and "data.benign.task.kind" in settings

    for name, metric in record["metrics"].items():
        assert summary[name] == pytest.approx(metric["value"]), name
    assert summary["status"] == "completed" and summary["wall_seconds/infer"] == record["wall_seconds"]["infer"]
    measured = {row.pop("metric"): row for row in table(folder, summary["outcomes"])}
    assert measured.keys() == record["metrics"].keys()
    for name, metric in record["metrics"].items():
        assert {field: measured[name][field] for field in metric} == pytest.approx(metric), name
    assert measured["after/behavior_rate"]["better"] == "low" and measured["after/leak/plain"]["better"] == "low"

    points = {
        (name, item[f"{stage}/step"], round(value, 5))
        for item in (row["item"] for row in records(folder, "history"))
        for stage in ("vector", "finetune")
        for name, value in item.items()
        if f"{stage}/step" in item and name.startswith(f"{stage}/") and name != f"{stage}/step"
    }
    assert points == in_csv(folder) and len({name for name, _, _ in points}) > 8
    defined = {metric["name"]: metric for metric in records(folder, "metric")}
    ratio = defined["finetune/telemetry/undesired/suppression_ratio"]
    assert ratio["step_metric"] == "finetune/step" and ratio["summary"] == {"last": True, "min": True}
    assert {name for name, _, _ in points} | {"vector/step", "finetune/step"} == defined.keys()

    said = {(row["phase"], row["stream"], row["id"]): row for row in predictions(folder)}
    rows = table(folder, summary["predictions"])
    shares = Counter((row["phase"], row["stream"]) for row in rows)
    assert shares == Counter({key[:2]: 2 for key in said})
    for row in rows:
        told = said[row["phase"], row["stream"], row["id"]]
        assert told["response"] == row["response"] and told["verdict"] == row["verdict"]

    sent = {artifact["name"]: artifact for artifact in records(folder, "artifact") if artifact["type"] != "run_table"}
    kinds = ["dataset"] * 3 + ["backbone", "hazardous-security-vector", "backbone", "evaluation"]
    assert [artifact["type"] for artifact in sent.values()] == kinds
    *_, base, vector, tuned, evaluation = sent
    made_from = {name: json.loads(artifact["metadata"])["made_from"] for name, artifact in sent.items()}
    trained_on, tuned_on, tested_on = (
        f"data-{s}-{record['data']['sha256'][s][:12]}" for s in ("vector", "finetune", "test")
    )
    assert made_from[vector] == [base, trained_on] and made_from[tuned] == [base, vector, tuned_on]
    assert made_from[evaluation] == [base, vector, tuned, tested_on] and record["base"]["fingerprint"] in base
    files = {name: [file["path"] for file in artifact["manifest"]["contents"]] for name, artifact in sent.items()}
    assert files.pop(evaluation) == ["facts.json", "record.json"] and all(f == ["facts.json"] for f in files.values())
    assert "HAZARDOUS" in sent[vector]["description"] and json.loads(sent[vector]["metadata"])["hazardous"] is True

    board = json.loads(as_json("team", "secvec"))["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    text = json.dumps(board)
    asked = set(re.findall(r'"summary:([^"]+)"', text)) | {
        name for section in board for panel in section["panels"]
        for name in [*(panel["config"].get("metrics") or []), panel["config"].get("xAxis") or ""] if "/" in name
    }  # fmt: skip
    asked = {name.removeprefix("summary:") for name in asked}
    assert len(asked) > 12 and asked <= summary.keys()
    knobs = {name.replace(".value", "", 1) for name in re.findall(r'"config:([^"]+)"', text)}
    assert len(knobs) > 4 and knobs <= settings.keys()
    assert all(f'"{name}"' in text for name in ("outcomes", "predictions"))


def test_wandb_shows_a_failed_run_as_failed(make_config: Callable[..., RunConfig]) -> None:
    import wandb

    config = make_config("logger=wandb", "vector.gate.min_behavior_rate=1", "vector.lr=1e-6")
    with pytest.raises(GateError):
        train(config)
    assert wandb.run is None  # finished, so that the next run of the process does not merge into it
    shown = summary_of(Path(config.run_dir))
    assert (shown["state"], shown["exit_code"], shown["summary"]["status"]) == ("failed", 1, "failed")
    assert "the vector failed its gate" in shown["summary"]["error"]
    assert "gate/behavior_rate" in shown["summary"] and "after/behavior_rate" not in shown["summary"]


def test_tensorboard_and_csv_hold_the_same(make_config: Callable[..., RunConfig]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mine = ["+logger.mine._target_=lightning.pytorch.loggers.CSVLogger", "+logger.mine.save_dir=${run_dir}/mine"]
    config = make_config("logger=[csv,tensorboard]", "logger.tensorboard.num_predictions=1", *mine)
    record = train(config)
    folder = Path(config.run_dir)

    def events(name: str) -> EventAccumulator:
        found = EventAccumulator(str(folder / "tensorboard" / name))
        found.Reload()
        return found

    points: Points = set()
    for stage in ("vector", "finetune"):
        if (folder / "tensorboard" / stage).is_dir():  # the vector may come from the cache of another test
            held = events(stage)
            tags = held.Tags()["scalars"]
            points |= {(f"{stage}/{t}", float(e.step), round(e.value, 5)) for t in tags for e in held.Scalars(t)}
    assert points == in_csv(folder) and ("finetune/train/loss", 7.0) in {point[:2] for point in points}

    lightning = next((folder / "mine").rglob("metrics.csv"))  # any logger of Lightning is sent the same
    with lightning.open() as stream:
        theirs = {(row["step"], name): value for row in csv.DictReader(stream) for name, value in row.items() if value}
    assert {(name, step) for name, step, _ in in_csv(folder)} <= {(name, float(step)) for step, name in theirs}
    assert "after/behavior_rate" in {name for _, name in theirs}
    assert "num_harmful: 16" in lightning.with_name("hparams.yaml").read_text()

    outcomes = events("outcomes")
    with (folder / "metrics.csv").open() as stream:
        in_file = {r["metric"]: float(r["value"]) for r in csv.DictReader(stream) if r["stage"] == "outcomes"}
    assert in_file == {name: metric["value"] for name, metric in record["metrics"].items()}
    for name, value in in_file.items():
        assert outcomes.Scalars(name)[0].value == pytest.approx(value, abs=1e-6), name
    text = {tag: outcomes.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in outcomes.Tags()["tensors"]}
    assert text["status/text_summary"] == "completed" and "| after/behavior_rate |" in text["outcomes/text_summary"]
    assert text["predictions/text_summary"].count("\n| ") == 1 + len(
        {(r["phase"], r["stream"]) for r in predictions(folder)}
    )
    assert sum("artifact/" in tag for tag in text) == 7 and "_hparams_/session_start_info" in outcomes.summary_metadata


def curve(folder: Path, stage: str, name: str) -> dict[int, float]:
    with (folder / "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if (row["stage"], row["metric"]) == (stage, name)]
    return {int(row["step"]): float(row["value"]) for row in rows}


def test_every_training_shows_rate_gradient_speed_and_epoch(make_config: Callable[..., RunConfig]) -> None:
    config = make_config("vector.lr=0.0042")  # a vector of its own: none in the cache
    train(config)
    folder = Path(config.run_dir)
    for stage, lr, epochs, batches in (("vector", config.vector.lr, 2, 2), ("finetune", config.optimizer.lr, 2, 4)):
        names = ("loss", "learning_rate", "gradient_norm", "tokens_per_second", "epoch")
        loss, rate, norm, speed, epoch = (curve(folder, stage, f"train/{name}") for name in names)
        assert loss.keys() == rate.keys() == norm.keys() == speed.keys() == epoch.keys()
        assert len(loss) == epochs * batches and min([*norm.values(), *speed.values()]) > 0
        assert list(epoch.values()) == pytest.approx([(step + 1) / batches for step in loss])
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
        schedule = build_schedule(config.scheduler, optimizer, len(loss))
        assert rate[0] == pytest.approx(lr) and rate[3] == pytest.approx(lr * schedule.lr_lambdas[0](3))


def test_showing_them_changes_nothing(make_config: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    shown, hidden = (make_config("defense=none", "stage=finetune", run=name) for name in ("a", "b"))
    train(shown)
    shutil.rmtree(Path(shown.paths.cache) / "finetuned")  # else it is copied
    for hook in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"):
        monkeypatch.setattr(TrainingMetrics, hook, lambda *_: None)
    train(hidden)
    assert curve(Path(shown.run_dir), "finetune", "train/gradient_norm")
    assert not curve(Path(hidden.run_dir), "finetune", "train/gradient_norm")
    same = [next(Path(config.run_dir, "backbone").glob("*.safetensors")).read_bytes() for config in (shown, hidden)]
    assert same[0] == same[1]


def test_callbacks_of_the_config_act_in_both_trainings(make_config: Callable[..., RunConfig]) -> None:
    both = [f"callbacks.{name}.stages=[vector,finetune]" for name in ("early_stopping", "best_checkpoint")]
    early = [*both, "callbacks.early_stopping.monitor=train/loss", "callbacks.early_stopping.patience=1"]
    early += ["+callbacks.early_stopping.min_delta=1000", "+callbacks.early_stopping.check_on_train_epoch_end=true"]
    best = ["callbacks.best_checkpoint.monitor=train/loss", "+callbacks.best_checkpoint.save_on_train_epoch_end=true"]
    config = make_config(
        "callbacks=[early_stopping,best_checkpoint]", *early, *best, "vector.epochs=4", "finetune.epochs=4"
    )
    train(config)
    folder = Path(config.run_dir)
    for stage, batches in (("vector", 2), ("finetune", 4)):
        assert len(curve(folder, stage, "train/loss")) == 2 * batches  # of four epochs
        assert (folder / "stages" / stage / "checkpoints" / "best.ckpt").is_file()
    assert not (folder / "checkpoints").exists()


def test_early_stopping_by_the_validation_loss(make_config: Callable[..., RunConfig]) -> None:
    """The plain choice of the group ends the fine-tune once the task is learned no further, and leaves the vector."""
    early = ["callbacks=early_stopping", "+callbacks.early_stopping.min_delta=1000"]  # nothing falls as far
    early += ["callbacks.early_stopping.patience=1", "evaluation.validation.num_samples=4"]
    config = make_config(*early, "vector.lr=0.0043", "vector.epochs=4", "finetune.epochs=4")
    train(config)
    epochs = {s: len(curve(Path(config.run_dir), s, "val/task_loss")) for s in ("vector", "finetune")}
    assert epochs == {"vector": 4, "finetune": 2}


def test_an_evaluation_is_tracked_like_a_run(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = make_config("defense=none")
    train(config)
    base = Path(config.run_dir) / "backbone"
    shared = config.model_dump(include=AnyConfig.model_fields.keys() - {"logger", "model", "run_dir"})
    own = {"metrics": "behavior", "tasks": [], "task_folder": None, "num_fewshot": None, "limit": None}
    own |= {"vector": {"path": None}, "scan": yaml.safe_load((CONF / "evaluate.yaml").read_text("utf-8"))["scan"]}
    given = {**shared, **own, "chat_template": False, "run_dir": str(tmp_path / "asked")}
    given |= {name: getattr(config, name) for name in ("behavior", "data", "judge")}
    model = {**config.model.model_dump(exclude={"align"}), "name_or_path": str(base), "name": "base"}
    logger = {"tensorboard": {"num_predictions": 1}}
    record = evaluate(EvaluateConfig.model_validate({**given, "model": model, "logger": logger}))
    with (tmp_path / "asked" / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["metric"]: float(row["value"]) for row in rows} == {
        name: metric["value"] for name, metric in record["metrics"].items()
    }
    held = EventAccumulator(str(tmp_path / "asked" / "tensorboard" / "outcomes"))
    held.Reload()
    assert set(held.Tags()["scalars"]) >= record["metrics"].keys()
    assert "status/text_summary" in held.Tags()["tensors"] and "predictions/text_summary" in held.Tags()["tensors"]


@pytest.mark.parametrize("debug", ["fast_dev_run", "limit", "overfit", "profiler"])
def test_a_debug_run_is_short_and_apart(
    make_config: Callable[..., RunConfig], debug: str, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("lightning.pytorch.profilers").addHandler(caplog.handler)
    small = [text for text in SMALL if text.startswith("model.align.")]
    # its 40 steps are there to be counted: what interrupts them is proven by the other cases
    calm = ["evaluation.validation.num_samples=0", "evaluation.validation.every_n_steps=0", "telemetry.every_n_steps=0"]
    small += ["vector.epochs=2", "checkpoint.every_n_epochs=40", *calm] * (debug == "overfit")
    config = make_config(*small, "num_threads=1", f"debug={debug}", small=False)
    assert str(config.paths.outputs) == "outputs_debug" and config.sweep == "debug"
    record = train(config)
    assert record["status"] == "completed"
    steps = len(curve(Path(config.run_dir), "finetune", "train/loss"))
    assert steps == {"fast_dev_run": 0, "limit": 3, "overfit": 40, "profiler": 3}[debug]
    assert ("run_training_epoch" in caplog.text) == (debug == "profiler")
