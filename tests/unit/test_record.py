"""The run folder: whole files or none, one process at a time, and a record that says how it ended."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from secvec import run
from secvec.config.load import RunConfig
from secvec.errors import ArtifactError, ConfigError, DataError, GateError
from secvec.runs.cache import cached
from secvec.runs.files import atomic_path, write_atomic
from secvec.runs.record import RunFolder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def record(folder: RunFolder) -> dict[str, Any]:
    return json.loads((folder.path / "record.json").read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", "key", {"seed": 3})


# -- files


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), atomic_path(tmp_path / "new") as path:
        path.mkdir()
        (path / "part").write_text("half")
        assert not (tmp_path / "new").exists()
        raise RuntimeError("stop")
    assert names(tmp_path) == []


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    write_atomic(tmp_path / "file", "old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "file") as path:
        path.write_text("half")
        raise RuntimeError
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_a_block_that_makes_nothing_does_not_take_away_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError), atomic_path(tmp_path / "folder"):
        pass
    assert names(tmp_path) == ["folder"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for content in ("first", "second"):
        with atomic_path(tmp_path / "deep" / "folder") as path:
            path.mkdir()
            (path / content).write_text(content)
    assert names(tmp_path / "deep") == ["folder"] and names(tmp_path / "deep" / "folder") == ["second"]
    write_atomic(tmp_path / "file", "long old text")
    write_atomic(tmp_path / "file", "é")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "é"


def test_what_is_cached_is_built_once(tmp_path: Path) -> None:
    built = []

    def build(path: Path) -> None:
        time.sleep(0.05)
        path.mkdir()
        (path / "file").write_text("done")
        built.append(path)

    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: cached(tmp_path / "cache" / "thing", build), range(4)))
    assert len(built) == 1 and built[0] != paths[0] == tmp_path / "cache" / "thing"
    assert (paths[0] / "file").read_text() == "done"
    cached(tmp_path / "cache" / "other", build)
    assert len(built) == 2


def test_what_could_not_be_built_is_not_cached(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.mkdir()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cached(tmp_path / "thing", fail)
    assert not (tmp_path / "thing").exists()
    assert cached(tmp_path / "thing", lambda path: path.mkdir()).is_dir()


# -- the run folder


def test_two_runs_in_the_same_folder_exclude_each_other(folder: RunFolder) -> None:
    other = RunFolder(folder.path, "key", {})
    with folder.running():
        with pytest.raises(ArtifactError, match=r"another process is running in .*run_dir"), other.running():
            raise AssertionError("both run")
        assert folder.path.is_dir()
    with other.running():
        pass
    assert record(other)["status"] == "completed"


def test_two_runs_in_different_folders_do_not(folder: RunFolder, tmp_path: Path) -> None:
    with folder.running(), RunFolder(tmp_path / "other", "key", {}).running():
        pass


def test_a_run_that_ends_well(folder: RunFolder) -> None:
    with folder.running():
        logging.getLogger("secvec.test").error("a line")
        folder.record["stages"].append("vector")
    found = record(folder)
    assert (found["status"], found["key"], found["run"], found["seed"]) == ("completed", "key", "run", 3)
    assert "error" not in found and found["created"] and found["versions"]["torch"]
    assert names(folder.path) == ["record.json", "train.log"]
    assert "a line" in (folder.path / "train.log").read_text()
    logging.getLogger("secvec.test").error("a later line")
    assert "later" not in (folder.path / "train.log").read_text()


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (DataError("row 7 is bad"), "row 7 is bad"),
        (RuntimeError("out of luck"), "RuntimeError: out of luck"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
    ],
)
def test_a_run_that_fails_after_a_stage_says_so(error: BaseException, says: str, folder: RunFolder) -> None:
    with pytest.raises(type(error)), folder.running():
        folder.record["stages"].append("vector")
        raise error
    found = record(folder)
    assert (found["status"], found["error"], found["stages"]) == ("failed", says, ["vector"])
    again = RunFolder(folder.path, "key", {})
    assert again.finished(["vector"]) and not again.finished(["vector", "infer"])
    with again.running():
        pass
    assert record(again)["status"] == "completed" and "error" not in record(again)


@pytest.mark.parametrize("error", [RuntimeError("out of luck"), GateError("not fit")])
def test_a_failure_that_is_no_mistake_of_the_user_is_recorded_at_once(error: Exception, folder: RunFolder) -> None:
    with pytest.raises(type(error)), folder.running():
        raise error
    assert record(folder)["status"] == "failed" and str(error) in record(folder)["error"]


@pytest.mark.parametrize("error", [ConfigError("wrong"), DataError("bad"), ArtifactError("gone")])
def test_a_mistake_of_the_user_before_any_stage_leaves_no_folder(error: Exception, folder: RunFolder) -> None:
    with pytest.raises(type(error)), folder.running():
        assert folder.path.is_dir()
        raise error
    assert not folder.path.exists()


def test_a_mistake_does_not_take_away_what_others_put_there(folder: RunFolder) -> None:
    folder.path.mkdir()
    (folder.path / "notes.txt").write_text("mine")
    with pytest.raises(DataError), folder.running():
        raise DataError("bad")
    assert names(folder.path) == ["notes.txt"]


def test_a_folder_of_another_run_is_refused(folder: RunFolder) -> None:
    with folder.running():
        pass
    RunFolder(folder.path, "key", {})
    with pytest.raises(
        ArtifactError, match=r"holds another run \(key key, this one is other\): choose another run_dir"
    ):
        RunFolder(folder.path, "other", {})


def test_a_record_that_is_no_json_is_named(folder: RunFolder) -> None:
    folder.path.mkdir()
    (folder.path / "record.json").write_text('{\n"key": oops}')
    with pytest.raises(ArtifactError, match=r"record.json:2: not a record"):
        RunFolder(folder.path, "key", {})


def test_the_same_run_goes_on_with_what_it_has(folder: RunFolder) -> None:
    with folder.running():
        folder.record["stages"].append("vector")
        folder.record["metrics"]["m"] = {"value": 1.0}
        folder.record["wall_seconds"]["vector"] = 2.0
    again = RunFolder(folder.path, "key", {"seed": 3})
    assert again.record["metrics"] == {"m": {"value": 1.0}} and again.record["wall_seconds"] == {"vector": 2.0}
    assert again.record["status"] == "running"


def test_forgetting_a_stage_takes_its_artifacts_and_no_other(folder: RunFolder) -> None:
    folder.record["stages"] = ["vector", "finetune", "infer"]
    for name in ("vector", "backbone", "task", "checkpoints"):
        (folder.path / name).mkdir(parents=True)
    folder.forget(["finetune", "infer"])
    assert folder.record["stages"] == ["vector"] and names(folder.path) == ["record.json", "vector"]


def predictions(folder: RunFolder) -> list[tuple[str, str]]:
    lines = (folder.path / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    return [(row["phase"], row["response"]) for row in map(json.loads, filter(None, lines))]


def test_predictions_of_a_phase_replace_those_of_the_same_phase_only(folder: RunFolder) -> None:
    folder.path.mkdir()
    folder.add_predictions([{"phase": "base", "response": "é\nx"}, {"phase": "after", "response": "old"}])
    folder.add_predictions([{"phase": "after", "response": "new"}, {"phase": "active", "response": "on"}])
    folder.add_predictions([])
    assert predictions(folder) == [("base", "é\nx"), ("after", "new"), ("active", "on")]


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029"])
def test_an_answer_may_hold_any_line_separator(mark: str, folder: RunFolder) -> None:
    folder.path.mkdir()
    folder.add_predictions([{"phase": "base", "response": f"a{mark}b"}])
    folder.add_predictions([{"phase": "after", "response": "new"}])
    assert predictions(folder) == [("base", f"a{mark}b"), ("after", "new")]


# -- a run in its folder


def test_force_waits_for_the_lock_before_it_deletes(make_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = make_config("force=true")
    other = RunFolder(tmp_path / "run", config.key(), {})
    with other.running():
        (tmp_path / "run" / "vector").mkdir()
        with pytest.raises(ArtifactError, match="another process"):
            run.train(config)
        assert (tmp_path / "run" / "vector").is_dir()


@pytest.mark.parametrize("given", ["defense=none", "vector.path={path}"])
def test_a_finished_run_is_not_run_again(
    given: str, make_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(given.format(path=tmp_path))
    done = RunFolder(tmp_path / "run", config.key(), {})
    with done.running():
        done.record["stages"] = ["finetune", "infer"]

    def started(config: RunConfig) -> None:
        raise AssertionError("run again")

    monkeypatch.setattr(run, "base_for", started)
    assert run.train(config)["stages"] == ["finetune", "infer"]
    with pytest.raises(AssertionError, match="run again"):
        run.train(config.model_copy(update={"force": True}))
