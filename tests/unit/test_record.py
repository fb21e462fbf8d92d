"""The run folder: whole files or none, one process at a time, and a record that says how it ended."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import isnan
from pathlib import Path
from typing import Any

import pytest

from secvec import run
from secvec.config.schema import RunConfig
from secvec.errors import ArtifactError, ConfigError, DataError, GateError
from secvec.metrics import Measurement
from secvec.runs import cache
from secvec.runs.cache import cached
from secvec.runs.files import atomic_path, write_atomic
from secvec.runs.folder import RunFolder
from secvec.runs.record import Record, record_failure
from secvec.stages import STAGES


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def record(folder: RunFolder) -> dict[str, Any]:
    return json.loads((folder.path / "record.json").read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", Record(key="key", seed=3))


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


# -- the record


OLD = Path(__file__).parents[1] / "data" / "old_run" / "record.json"
"""As version 0.1.0 wrote it, with two keys: `key`, and `content` of the config before validation."""


def test_an_old_record_is_read_and_written_again_with_all_that_it_says() -> None:
    old, read = json.loads(OLD.read_text(encoding="utf-8")), Record.read(OLD)
    assert (read.run, read.key, read.seed, read.status) == ("old_run", old["key"], 0, "completed")
    assert read.stages == ["vector", "finetune", "infer"] and read.data.counts["finetune"]["undesired"] == 24
    rate = read.metrics["after/behavior_rate"]
    assert 0 <= rate.ci_low <= rate.value <= rate.ci_high <= 1 and rate.n == 6  # type: ignore[operator]
    assert read.base is not None and read.base.fingerprint == old["base"]["fingerprint"]
    assert old.items() <= read.as_dict().items() and "content" in old and "drift" in old["metrics"]


def test_a_run_goes_on_in_a_folder_of_an_old_version(tmp_path: Path) -> None:
    shutil.copy(OLD, tmp_path)
    folder = RunFolder(tmp_path, Record(key=Record.read(OLD).key))
    assert folder.finished(["vector", "finetune", "infer"]) and folder.record.metrics == Record.read(OLD).metrics
    with pytest.raises(ArtifactError, match="holds another run"):
        RunFolder(tmp_path, Record(key="other"))


def test_what_a_record_holds_survives_the_disk(tmp_path: Path) -> None:
    first = Record(key="k", seed=1, defense="none", status="completed", later="kept")  # type: ignore[call-arg]
    first.metrics |= {"after/behavior_rate": Measurement(0.5, 0.4, 0.6, 10), "drift": Measurement(float("nan"))}
    first.ledger = {"backbone": [3, 0, True]}
    first.write(tmp_path / "record.json")
    again = Record.read(tmp_path / "record.json")
    assert again.metrics.pop("after/behavior_rate") == Measurement(0.5, 0.4, 0.6, 10)
    assert isnan(again.metrics["drift"].value) and again.ledger == {"backbone": [3, 0, True]}
    assert again.as_dict()["later"] == "kept" and "error" not in again.as_dict()
    assert json.loads((tmp_path / "record.json").read_text(), parse_constant=pytest.fail)["schema"] == 1
    assert Record(key="other").metrics == {} and Record().data.counts == {}  # no two share a default


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": 2}, "schema is 2, this version of secvec reads schema 1"),
        ({"seed": "0"}, "`seed` should be int, it is '0'"),
        ({"defense": None}, "`defense` should be str, it is None"),
        ({"metrics": {"a": {"value": "high"}}}, "`metrics.a.value`: .*it is 'high'"),
        ({"status": "done"}, "`status`: .*'completed'.*it is 'done'"),
    ],
)
def test_a_record_of_the_wrong_form_is_named_with_its_field(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"schema": 1, "status": "completed", "defense": "none", "seed": 0} | change))
    with pytest.raises(DataError, match=f"record.json: {says}.*"):
        Record.read(path)
    assert Record.find(tmp_path) is None


def test_a_failed_run_may_not_know_its_seed(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text(json.dumps({"schema": 1, "status": "failed", "seed": "x", "defense": None}))
    found = Record.find(tmp_path)
    assert found is not None and (found.seed, found.defense) == (None, "unknown")


def test_a_failure_is_written_for_a_run_that_could_not(tmp_path: Path) -> None:
    known = Record(seed=5, stage="all", metrics={"a": Measurement(1.0)})
    assert record_failure(tmp_path, "killed by signal 9", known).status == "failed"
    again = record_failure(tmp_path, "out of memory", Record(seed=6))
    assert again == Record.read(tmp_path / "record.json")
    assert (again.error, again.seed, again.run, set(again.metrics)) == ("out of memory", 5, tmp_path.name, {"a"})


# -- the run folder


def test_two_runs_in_the_same_folder_exclude_each_other(folder: RunFolder) -> None:
    other = RunFolder(folder.path, Record(key="key"))
    with folder.running():
        with pytest.raises(ArtifactError, match=r"another process is running in .*run_dir"), other.running():
            raise AssertionError("both run")
        assert folder.path.is_dir()
    with other.running():
        pass
    assert record(other)["status"] == "completed"


def test_two_runs_in_different_folders_do_not(folder: RunFolder, tmp_path: Path) -> None:
    with folder.running(), RunFolder(tmp_path / "other", Record(key="key")).running():
        pass


def test_a_run_that_ends_well(folder: RunFolder) -> None:
    with folder.running():
        logging.getLogger("secvec.test").error("a line")
        folder.record.stages.append("vector")
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
        folder.record.stages.append("vector")
        raise error
    found = record(folder)
    assert (found["status"], found["error"], found["stages"]) == ("failed", says, ["vector"])
    again = RunFolder(folder.path, Record(key="key"))
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
    RunFolder(folder.path, Record(key="key"))
    with pytest.raises(
        ArtifactError, match=r"holds another run \(key key, this one is other\): choose another run_dir"
    ):
        RunFolder(folder.path, Record(key="other"))


def test_a_record_that_is_no_json_is_named(folder: RunFolder) -> None:
    folder.path.mkdir()
    (folder.path / "record.json").write_text('{\n"key": oops}')
    with pytest.raises(DataError, match=r"record.json: line 2, column 8: not valid JSON"):
        RunFolder(folder.path, Record(key="key"))


def test_the_same_run_goes_on_with_what_it_has(folder: RunFolder) -> None:
    with folder.running():
        folder.record.stages.append("vector")
        folder.record.metrics["m"] = Measurement(1.0)
        folder.record.wall_seconds["vector"] = 2.0
    again = RunFolder(folder.path, Record(key="key", seed=3))
    assert again.record.metrics == {"m": Measurement(1.0)} and again.record.wall_seconds == {"vector": 2.0}
    assert again.record.status == "running"


def test_forgetting_a_stage_takes_its_artifacts_and_no_other(folder: RunFolder) -> None:
    folder.record.stages = ["vector", "finetune", "infer"]
    for name in ("vector", "backbone", "task", "vector-refitted", "checkpoints", "answers"):
        (folder.path / name).mkdir(parents=True)
    again = ["finetune", "infer"]
    folder.forget(again, [name for stage in again for name in STAGES[stage].artifacts])
    assert folder.record.stages == ["vector"] and names(folder.path) == ["record.json", "vector"]


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
    other = RunFolder(tmp_path / "run", Record(key=config.key))
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
    done = RunFolder(tmp_path / "run", Record(key=config.key, defense="none", seed=0))
    with done.running():
        done.record.stages = ["finetune", "infer"]

    def started(of: run.Run) -> None:
        raise AssertionError("run again")

    monkeypatch.setattr(run, "starting_model", started)
    assert run.train(config)["stages"] == ["finetune", "infer"]
    with pytest.raises(AssertionError, match="run again"):
        run.train(config.model_copy(update={"force": True}))


def test_the_other_processes_of_a_run_wait_for_what_the_first_one_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They save nothing: under torchrun they are there from the start."""
    monkeypatch.setattr(cache, "main_process", lambda: threading.current_thread() is not threading.main_thread())
    first = threading.Timer(0.3, cached, [tmp_path / "base", lambda out: out.write_text("made")])
    first.start()
    assert cached(tmp_path / "base", lambda _: pytest.fail("it is no process that saves")).read_text() == "made"
    first.join()


@pytest.mark.parametrize("kinds", [("file", "folder"), ("folder", "file"), ("folder", "folder"), ("file", "file")])
def test_a_folder_takes_the_place_of_a_file_and_the_other_way_round(tmp_path: Path, kinds: tuple[str, str]) -> None:
    for number, kind in enumerate(kinds):
        with atomic_path(tmp_path / "thing") as path:
            if kind == "folder":
                path.mkdir()
            (path / "part" if kind == "folder" else path).write_text(str(number))
    made = tmp_path / "thing" / "part" if kinds[1] == "folder" else tmp_path / "thing"
    assert made.read_text() == "1" and [entry.name for entry in tmp_path.iterdir()] == ["thing"]


def test_a_run_that_was_killed_after_its_last_stage_is_completed(folder: RunFolder) -> None:
    """It was found finished by the next start, which trains nothing, and its record said `failed` for ever."""
    with folder.running():
        folder.record.stages = ["finetune", "infer"]
    made = record(folder)["commit"]
    record_failure(folder.path, "killed by signal 11", Record())
    again = RunFolder(folder.path, Record(key="key", seed=3))
    assert again.finished(["finetune", "infer"])
    again.complete()
    mended = record(folder)
    assert (mended["status"], mended.get("error"), mended["commit"]) == ("completed", None, made)
