"""What is sent to trackers, what is kept back, and what W&B is told; nothing here trains or goes online."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
import yaml
from configs import composed
from conftest import ROOT
from hydra._internal.utils import get_args
from omegaconf import DictConfig, OmegaConf
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from hydra_plugins.process_launcher import ProcessLauncher
from secvec.config.load import load
from secvec.config.schema import RunConfig
from secvec.errors import ConfigError
from secvec.metrics import Measurement, metric_of
from secvec.multirun.job import Job
from secvec.multirun.local import LocalExecutor
from secvec.runs.keys import VARIES
from secvec.runs.record import Record
from secvec.settings.multirun import ProcessSettings
from secvec.settings.trainer import LoggerSettings, WandbSettings
from secvec.tracking import dashboard
from secvec.tracking.artifacts import artifacts
from secvec.tracking.base import Tracker, Trackers, flat
from secvec.tracking.csv_file import CsvFile, read_curves
from secvec.tracking.session import Session, prediction_rows
from secvec.tracking.wandb import PROJECT, Wandb, better, run_id, run_name


class Heard(Tracker):
    """Keeps the calls it gets."""

    keeps_artifacts = True

    def __init__(self, num_predictions: int = 0) -> None:
        self.num_predictions = num_predictions
        self.calls: list[tuple[Any, ...]] = []

    def open(self, record: Record) -> None:
        self.calls.append(("open", record.status))

    def outcomes(self, values: Any) -> None:
        self.calls.append(("outcomes", values))

    def table(self, name: str, columns: Any, rows: Any) -> None:
        self.calls.append(("table", name, len(rows)))

    def artifact(self, artifact: Any) -> None:
        self.calls.append(("artifact", artifact.name))

    def close(self, record: Record) -> None:
        self.calls.append(("close", record.status))


def record(**more: Any) -> Record:
    config = {"sweep": "s", "defense": {"name": "none"}, "model": {}, "vector": {"path": None}, "seed": 1}
    data = {"sha256": {"vector": "a" * 64}, "counts": {"vector": {"undesired": 3}}}
    known = {
        "run": "folder",
        "key": "abc",
        "status": "running",
        "stage": "all",
        "stages": [],
        "seed": 1,
        "tune": "full",
    }
    names = {"behavior": "wild", "defense": "none", "model": "tiny", "overrides": [], "wall_seconds": {}, "metrics": {}}
    return Record.model_validate({**known, **names, "config": config, "data": data, **more})


def wandb_settings(**given: Any) -> WandbSettings:
    kept = {"project": "p", "entity": None, "offline": True, "num_predictions": 0, "upload_vector": False}
    return WandbSettings(**{**kept, **given})


# -- the session


def test_every_tracker_gets_the_same_and_a_failed_run_sends_what_it_has(tmp_path: Path) -> None:
    one, two, known = Heard(), Heard(), record(metrics={"base/behavior_rate": Measurement(0.5)})
    with pytest.raises(ValueError, match="broken"):  # noqa: SIM117
        with Session(Trackers(one, two), tmp_path, known, LoggerSettings()) as session:
            session.open()
            with session.stage():
                known.metrics["gate/behavior_rate"] = Measurement(0.25)
                known.status = "failed"
                raise ValueError("broken")
    sent = {"base/behavior_rate": 0.5, "gate/behavior_rate": 0.25}
    assert one.calls == two.calls == [
        ("open", "running"), ("outcomes", sent), ("table", "outcomes", 2), ("artifact", "data-vector-aaaaaaaaaaaa"),
        ("close", "failed"),
    ]  # fmt: skip


def test_a_run_that_did_not_begin_sends_nothing(tmp_path: Path) -> None:
    heard = Heard()
    with pytest.raises(ValueError), Session(Trackers(heard), tmp_path, record(), LoggerSettings()):
        raise ValueError("another process is running here")
    assert heard.calls == []


def test_an_outcome_is_sent_again_only_when_it_changed(tmp_path: Path) -> None:
    heard, known = Heard(), record(metrics={"drift": Measurement(1.0)})
    session = Session(Trackers(heard), tmp_path, known, LoggerSettings())
    for value in (1.0, 1.0, 2.0):
        with session.stage():
            known.metrics["drift"] = Measurement(value)
    assert heard.calls == [("outcomes", {"drift": 1.0}), ("outcomes", {"drift": 2.0})]


def test_predictions_are_few_and_sensitive_ones_are_cut_and_marked(tmp_path: Path) -> None:
    def row(stream: str, number: int, sensitive: bool) -> dict[str, Any]:
        texts = {name: name[0] * 300 for name in ("prompt", "response", "reference")}
        judged = {"verdict": "behavior", "score": None, "coherent": True, "sensitive": sensitive}
        return {"phase": "after", "stream": stream, "id": f"{stream}-{number}", **texts, **judged}

    path = tmp_path / "predictions.jsonl"
    rows = [*(row("undesired", i, True) for i in range(4)), *(row("task", i, False) for i in range(4))]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    shown = prediction_rows(path, 2)
    assert [r[2] for r in shown] == ["undesired-0", "undesired-1", "task-0", "task-1"]
    assert all(len(str(text)) == 81 for text in shown[0][3:6]) and shown[0][-1] == "sensitive, truncated"
    assert shown[2][4] == "r" * 300 and shown[2][-1] == ""
    assert prediction_rows(path, 0) == [] == prediction_rows(tmp_path / "none.jsonl", 2)


def test_each_tracker_gets_as_many_predictions_as_it_was_set(tmp_path: Path) -> None:
    row = {name: "" for name in ("prompt", "response", "reference", "verdict", "score", "coherent")}
    lines = [
        json.dumps({**row, "phase": "after", "stream": "task", "id": str(i), "sensitive": False}) for i in range(3)
    ]
    (tmp_path / "predictions.jsonl").write_text("\n".join(lines))
    none, two = Heard(), Heard(2)
    with Session(Trackers(none, two), tmp_path, record(), LoggerSettings()) as session:
        session.open()
    assert ("table", "predictions", 2) in two.calls and "predictions" not in str(none.calls)


# -- metrics.csv


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as stream:
        return list(csv.reader(stream))


def test_metrics_keep_the_rows_of_other_stages_and_drop_their_own_unless_resumed(tmp_path: Path) -> None:
    path, head = tmp_path / "metrics.csv", ["stage", "step", "metric", "value"]
    tracker = CsvFile(path)
    for stage, value in (("vector", 2.5), ("finetune", 1.5)):
        tracker.begin_stage(stage, False)
        tracker.curves(stage, 1, {"train/loss": value})
    vector = ["vector", "1", "train/loss", "2.5"]
    assert rows(path) == [head, vector, ["finetune", "1", "train/loss", "1.5"]]
    tracker.begin_stage("finetune", True)
    tracker.curves("finetune", 2, {"train/loss": 0.5})
    assert len(rows(path)) == 4 and rows(path)[3] == ["finetune", "2", "train/loss", "0.5"]
    tracker.begin_stage("finetune", False)
    assert rows(path) == [head, vector]
    for value in (0.5, 0.25):
        tracker.outcomes({"drift": value})
    assert rows(path) == [head, vector, ["outcomes", "", "drift", "0.25"]]


# -- what W&B is told


def test_a_run_is_named_by_what_varies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIES, raising=False)
    given = [
        "defense=none",
        "seed=1",
        "data.num_harmful=10",
        "logger=wandb",
        "logger.wandb.offline=false",
        "paths.cache=c",
    ]
    assert run_name(record(overrides=given)) == "none seed=1 data.num_harmful=10"
    assert run_name(record(overrides=["sweep=x"])) == "folder"
    monkeypatch.setenv(VARIES, "defense=none\n+experiment=demo")
    assert run_name(record(overrides=given)) == "none demo"


def test_the_launcher_tells_each_job_what_varies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def composed(_: object, overrides: list[str]) -> DictConfig:
        name = overrides[1].partition("=")[2]
        return OmegaConf.create({"key": name, "sweep": "x", "hydra": {"sweep": {"subdir": name}, "job": {}}})

    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr("hydra_plugins.process_launcher.get_args", lambda: get_args([]))
    launcher = ProcessLauncher()
    launcher.config = OmegaConf.create({"hydra": {"overrides": {"hydra": []}}})
    launcher.hydra_context = SimpleNamespace(config_loader=SimpleNamespace(load_sweep_config=composed))  # type: ignore[assignment]
    asked = [["defense=none", f"seed={seed}", "sweep=x"] for seed in (0, 1)]
    jobs = launcher._jobs(asked, tmp_path, 0)
    executor = LocalExecutor(ProcessSettings(n_jobs=2, memory_gb=None), jobs)
    monkeypatch.setattr(Job, "start", lambda self, forked=None: None)
    executor.admit(jobs)  # gives them threads, ports and GPUs by their environment too
    assert [job.environment[VARIES] for job in jobs] == ["seed=0", "seed=1"] == [job.label for job in jobs]


def test_a_folder_keeps_its_run_id_and_no_two_share_one(tmp_path: Path) -> None:
    first = run_id(tmp_path / "a", "key", fresh=False)
    assert first.startswith("key-") and run_id(tmp_path / "a", "key", fresh=False) == first
    assert run_id(tmp_path / "b", "key", fresh=False) != first
    assert run_id(tmp_path / "a", "key", fresh=True) != first


def test_the_better_direction_of_a_curve_is_that_of_the_report() -> None:
    assert better("train/kl") == better("val/task_loss_vector_on") == "low" and better("train/gradient_norm") is None
    assert better("telemetry/undesired/suppression_ratio") == "low"
    assert better("telemetry/drift") is None and better("eval/task_accuracy") == "high" and better("other") is None


def test_every_setting_has_a_dotted_name() -> None:
    config = {"data": {"benign": [{"kind": "task"}, {"kind": "x"}]}, "optimizer": {"betas": [0.9, 0.99]}, "seed": 0}
    assert flat(config) == {
        "data.benign.0.kind": "task", "data.benign.1.kind": "x", "optimizer.betas": [0.9, 0.99], "seed": 0,
    }  # fmt: skip


def test_online_without_an_account_is_an_error_that_asks_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "login", lambda **how: asked.append(how))
    monkeypatch.setattr(wandb, "init", lambda **how: pytest.fail("went on"))
    with pytest.raises(ConfigError, match=r"wandb login.*logger\.wandb\.offline=true"):
        Wandb(tmp_path, wandb_settings(offline=False), False).open(record())
    assert asked == [{"prompt": False, "verify": False}]


def test_without_a_network_it_says_so_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "login", lambda **how: True)
    closed = SimpleNamespace(settings=SimpleNamespace(base_url="http://127.0.0.1:9"))
    monkeypatch.setattr(wandb, "setup", lambda: closed)
    monkeypatch.setattr(wandb, "init", lambda **how: pytest.fail("went on"))
    with pytest.raises(ConfigError, match=r"cannot be reached at .*set logger\.wandb\.offline=true"):
        Wandb(tmp_path, wandb_settings(offline=False), False).open(record())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "settings", "account"),
    [
        ({}, {}, ("secvec", None, "offline")),
        ({"WANDB_MODE": "disabled"}, {}, ("secvec", None, "disabled")),
        ({"WANDB_MODE": "disabled"}, {"offline": False}, ("secvec", None, "online")),
        ({"WANDB_PROJECT": "p", "WANDB_ENTITY": "e"}, {}, ("p", "e", "offline")),
        ({"WANDB_PROJECT": "p", "WANDB_ENTITY": "e"}, {"project": "q", "entity": "f"}, ("q", "f", "offline")),
    ],
)
def test_its_own_variables_count_where_a_setting_has_its_default(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    settings: dict[str, Any],
    account: tuple[str, str | None, str],
) -> None:
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    changed = wandb_settings().model_copy(update={"project": PROJECT} | settings)
    assert Wandb(tmp_path, changed, False).account() == account


def test_a_disabled_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    tracker = Wandb(tmp_path, wandb_settings(), False)
    tracker.open(record())
    tracker.curves("vector", 1, {"train/loss": 1.0})
    tracker.close(record())
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ConfigError, match="did you mean 'offline'"):
        tracker.open(record())


# -- artifacts


def vector_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "adapter_config.json").write_text(json.dumps({"r": 8}))
    (folder / "README.md").write_text("hazardous by design")
    return folder


def test_a_vector_is_marked_hazardous_and_its_weights_stay_unless_asked_for(tmp_path: Path) -> None:
    vector_in(tmp_path / "vector")
    (vector,) = (a for a in artifacts(tmp_path, record(), False) if a.name.startswith("vector"))
    assert vector.kind == "hazardous-security-vector" and "HAZARDOUS" in vector.about and vector.facts["hazardous"]
    assert vector.files == () and vector.facts["weights"] == "not sent" and not vector.used
    assert vector.made_from == ("data-vector-aaaaaaaaaaaa",)
    (sent,) = (a for a in artifacts(tmp_path, record(), True) if a.name == vector.name)
    assert {file.name for file in sent.files} == {"adapter_model.safetensors", "adapter_config.json", "README.md"}


def test_wandb_takes_the_names_of_any_behavior(tmp_path: Path) -> None:
    """Its own rule for names; a run of hours ended in a traceback."""
    vector_in(tmp_path / "vector")
    for one in artifacts(tmp_path, record().model_copy(update={"behavior": "pirate speech für " + "x" * 120}), False):
        wandb.Artifact(one.name, type=one.kind)


def test_a_vector_says_whose_behavior_it_shows_and_each_of_several_is_there(tmp_path: Path) -> None:
    vector_in(tmp_path / "vector")
    again = vector_in(tmp_path / "vector-refitted")
    (again / "adapter_model.safetensors").write_bytes(b"others")
    (again / "secvec.json").write_text(json.dumps({"behavior": "stereotype", "backbone": "b"}))
    one, two = (a for a in artifacts(tmp_path, record(), False) if a.name.startswith("vector"))
    assert one.name.startswith("vector-wild-") and two.name.startswith("vector-stereotype-")
    assert two.facts["backbone"] == "b" and "stereotype" in two.about


def test_a_vector_given_by_path_is_an_input_if_it_was_used(tmp_path: Path) -> None:
    given = vector_in(tmp_path / "given")
    known = record(config={**record().config, "vector": {"path": str(given)}})
    assert not [a for a in artifacts(tmp_path / "run", known, False) if a.name.startswith("vector")]
    known.ledger = {"vector": [1, False, True]}
    (vector,) = (a for a in artifacts(tmp_path / "run", known, False) if a.name.startswith("vector"))
    assert vector.used and vector.made_from == ()


@pytest.mark.parametrize("offline", [True, False])
def test_an_input_is_marked_as_used_where_wandb_can(tmp_path: Path, offline: bool) -> None:
    calls: list[tuple[str, str]] = []

    class Run:
        def use_artifact(self, artifact: wandb.Artifact) -> None:
            calls.append(("used", artifact.name))

        def log_artifact(self, artifact: wandb.Artifact) -> None:
            calls.append(("logged", artifact.name))

    tracker = Wandb(tmp_path, wandb_settings(offline=offline), False)
    tracker.run = Run()
    vector_in(tmp_path / "vector")
    for artifact in artifacts(tmp_path, record(), False):
        tracker.artifact(artifact)
    data, vector = calls
    assert data == ("logged" if offline else "used", "data-vector-aaaaaaaaaaaa") and vector[0] == "logged"


# -- dashboard and sweep


def test_the_dashboard_is_printed_without_an_account_and_saved_only_with_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "login", lambda **how: asked.append(how))
    assert dashboard.main(["team/secvec", "--print"]) == 0 and not asked
    shown = json.loads(capsys.readouterr().out)
    assert shown["workspace"]["project"] == "secvec" and shown["report"]["project"]["entityName"] == "team"
    grids = [block for block in shown["report"]["spec"]["blocks"] if block["type"] == "panel-grid"]
    assert len(grids) == len(shown["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]) == 4
    assert dashboard.main(["team/secvec"]) == 2 and asked == [{"prompt": False, "verify": False}]
    assert "wandb login" in capsys.readouterr().err
    assert dashboard.main(["secvec"]) == 2 and "expected ENTITY/PROJECT" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    assert dashboard.main(["team/secvec", "--print"]) == 2 and "secvec[dashboard]" in capsys.readouterr().err


def sweep_arguments(**values: Any) -> list[str]:
    """What W&B's agent puts in the place of `${args_no_hyphens}`."""
    return create_sweep_command_args({"args": {k: {"value": v} for k, v in values.items()}})["args_no_hyphens"]


def test_the_wandb_sweep_is_valid_and_each_of_its_values_composes() -> None:
    engine = pytest.importorskip("sweeps.config")
    sweep = yaml.safe_load((ROOT / "sweeps" / "wandb.yaml").read_text())
    assert engine.schema_violations_from_proposed_config(sweep) == []
    assert engine.schema_violations_from_proposed_config({**sweep, "method": "guess"}) != []
    assert (ROOT / sweep["program"]).is_file() and sweep["command"][-1] == "${args_no_hyphens}"
    direction = {"low": "minimize", "high": "maximize"}[
        str(metric_of(sweep["metric"]["name"].partition("/")[2]).better)
    ]
    assert sweep["metric"]["goal"] == direction
    fixed = [text for text in sweep["command"] if "=" in text]
    first = {key: settings["values"][0] for key, settings in sweep["parameters"].items()}
    names = {key: settings["values"] for key, settings in sweep["parameters"].items()}
    for key, value in ((key, value) for key, values in names.items() for value in values):
        given = sweep_arguments(**(first | {key: value}))
        assert f"{key}={value}" in given
        config = load(composed(*fixed, *given), RunConfig)
        assert config.logger.wandb is not None and not config.logger.wandb.offline and config.force
        settings = flat(config.model_dump(mode="json"))
        assert settings[key if "." in key or key == "seed" else f"{key}.name"] == value


def test_a_line_that_was_cut_takes_no_other_with_it(tmp_path: Path) -> None:
    """A full disk or a kill: the next row glued onto it, and the file could not be read any more."""
    path = tmp_path / "metrics.csv"
    curves = CsvFile(path)
    curves.begin_stage("finetune", False)
    curves.curves("finetune", 1, {"train/loss": 2.0, "during/a, b": 0.5})
    path.write_bytes(path.read_bytes() + b"finetune,2,train/l")
    curves.curves("finetune", 3, {"train/loss": 1.0})
    curves.outcomes({"after/behavior_rate": 0.0})
    assert read_curves(path, "finetune") == [(1, {"train/loss": 2.0, "during/a, b": 0.5}), (3, {"train/loss": 1.0})]


def test_a_resumed_training_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    first = CsvFile(path)
    first.begin_stage("finetune", False)
    for step in range(1, 6):
        first.curves("finetune", step, {"train/loss": float(step)})
    first.curves("vector", 9, {"train/loss": 9.0})
    again = CsvFile(path)
    again.begin_stage("finetune", True)
    again.curves("finetune", 3, {"telemetry/drift": 0.1})  # where it goes on from
    for step in (4, 5, 6):
        again.curves("finetune", step, {"train/loss": 10.0 * step})
    steps = [(step, values.get("train/loss")) for step, values in read_curves(path, "finetune")]
    assert [value for _, value in steps if value] == [1, 2, 3, 40, 50, 60]
    assert read_curves(path, "vector") == [(9, {"train/loss": 9.0})]
