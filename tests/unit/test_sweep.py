"""Jobs of a multirun without Hydra: what is finished, who may start, how ends are told, what a machine holds."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import ROOT
from hydra.core.override_parser.overrides_parser import OverridesParser

from hydra_plugins.process_launcher import _refuse_collisions
from hydra_plugins.search_sweeper import SearchSweeper
from secvec.errors import ConfigError
from secvec.multirun import local
from secvec.multirun.job import Job, stop
from secvec.multirun.local import GB, LocalExecutor
from secvec.multirun.run import Progress, run_jobs
from secvec.multirun.slurm import SlurmExecutor, parameters
from secvec.settings.messages import checked
from secvec.settings.multirun import ProcessSettings, SearchSettings, SlurmSettings

SLEEP = "import time; time.sleep(60)"


def job(folder: Path, code: str = "", **config: Any) -> Job:
    return Job(
        [f"seed={folder.name}"], {"stage": "all", **config}, "key", folder, [sys.executable, "-c", code], "a job"
    )


def settings(**given: Any) -> ProcessSettings:
    return ProcessSettings(**{"n_jobs": 1, "memory_gb": None, **given})


def write(folder: Path, **record: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    done = {"schema": 1, "status": "completed", "key": "key", "stages": ["vector", "finetune", "infer"]}
    done |= {"defense": "none", "seed": 0}
    (folder / "record.json").write_text(json.dumps(done | record))


def given(path: str, **changed: Any) -> dict[str, Any]:
    values = yaml.safe_load((ROOT / "conf" / "hydra" / path).read_text())
    values.pop("_target_")
    return values | changed


# -- settings


def test_the_values_in_conf_are_valid_and_a_wrong_one_is_named() -> None:
    assert checked(ProcessSettings, given("launcher/process.yaml"), "hydra.launcher").n_jobs == 1
    assert checked(SlurmSettings, given("launcher/slurm.yaml"), "hydra.launcher").cluster == "slurm"
    assert checked(SearchSettings, given("sweeper/search.yaml"), "hydra.sweeper").space == {}
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.n_jobs: got 0; .*greater than or equal to 1"):
        checked(ProcessSettings, given("launcher/process.yaml", n_jobs=0), "hydra.launcher")
    with pytest.raises(ConfigError, match=r"hydra\.sweeper\.direction: .*'maximize' or 'minimize'.*mean 'maximize'"):
        checked(SearchSettings, given("sweeper/search.yaml", direction="maximise"), "hydra.sweeper")


# -- what is finished


@pytest.mark.parametrize(
    ("record", "config", "finished"),
    [
        ({}, {}, True),
        ({"key": "other"}, {}, False),
        ({"status": "failed"}, {}, False),
        ({"status": "running"}, {}, False),
        ({"stages": ["vector"]}, {}, False),
        ({"stages": ["vector"]}, {"stage": "vector"}, True),
        ({}, {"force": True}, False),
        ({}, {"plan": True}, False),
    ],
)
def test_a_job_is_finished_by_content_and_stages(
    tmp_path: Path, record: dict[str, Any], config: dict[str, Any], finished: bool
) -> None:
    write(tmp_path / "any-name", **record)
    assert job(tmp_path / "any-name", **config).finished() is finished


def test_no_record_or_a_broken_one_or_an_evaluation_is_not_finished(tmp_path: Path) -> None:
    assert not job(tmp_path).finished()
    (tmp_path / "record.json").write_text('{"status": ')
    assert not job(tmp_path).finished()
    write(tmp_path)
    evaluation = job(tmp_path)
    del evaluation.config["stage"]  # it may be asked of a model that has changed since
    assert job(tmp_path).finished() and not evaluation.finished()


# -- who may start


def test_one_process_per_folder_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    first, second = job(tmp_path, SLEEP), job(tmp_path, SLEEP)
    process = first.start()
    assert process is not None and second.start() is None and second.busy
    process.send_signal(signal.SIGKILL)
    process.wait()
    again = second.start()
    assert again is not None and not second.busy
    stop([again])
    assert again.returncode is not None


def test_signals_may_be_kept_from_a_job_and_stopping_it_still_works(tmp_path: Path) -> None:
    code = "import sys, time; print('up', flush=True); time.sleep(60)"
    one = job(tmp_path, code)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a multirun in the background of a script
    process = one.start((signal.SIGTERM,))
    signal.signal(signal.SIGINT, before)
    assert process is not None
    while one.last_line() != "up":
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    stop([process])
    assert process.returncode == -signal.SIGINT


def test_a_job_does_not_join_the_process_group_around_the_multirun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_NTASKS", "MASTER_PORT", "RANK", "KEPT"):
        monkeypatch.setenv(name, "only here")
    one = job(tmp_path, "import os; print([name for name, value in os.environ.items() if value == 'only here'])")
    process = one.start()
    assert process is not None and process.wait() == 0
    assert one.last_line() == "['KEPT']"


# -- how jobs end


def test_one_that_fails_or_is_killed_is_marked_and_does_not_stop_the_others(tmp_path: Path) -> None:
    codes = {
        "good": "", "mistake": "import sys; print('error: lr is wrong', file=sys.stderr); sys.exit(2)",
        "killed": "import os; os.kill(os.getpid(), 9)", "crash": "1/0",
    }  # fmt: skip
    jobs = {name: job(tmp_path / name, code, seed=3) for name, code in codes.items()}
    run_jobs(list(jobs.values()), LocalExecutor(settings(n_jobs=2), list(jobs.values())))
    assert {name: one.code for name, one in jobs.items()} == {"good": 0, "mistake": 2, "killed": -9, "crash": 1}
    records = {name: json.loads((tmp_path / name / "record.json").read_text()) for name in codes if name != "good"}
    assert not (tmp_path / "good" / "record.json").exists()
    assert {record["status"] for record in records.values()} == {"failed"} and records["crash"]["seed"] == 3
    assert records["mistake"]["error"] == "lr is wrong"
    assert "killed by signal 9 (SIGKILL; out of memory?)" in records["killed"]["error"]
    assert "ZeroDivisionError" in records["crash"]["error"]


def test_what_a_failed_job_had_recorded_stays(tmp_path: Path) -> None:
    write(tmp_path, status="running", metrics={"a": {"value": 1.0}}, seed=5)
    one = job(tmp_path)
    one.code = -9
    one.mark_failure()
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["status"], record["metrics"]["a"]["value"], record["seed"]) == ("failed", 1.0, 5)


def test_what_an_earlier_try_failed_with_is_not_said_of_this_one(tmp_path: Path) -> None:
    write(tmp_path, status="failed", error="the disk is full", metrics={"a": {"value": 1.0}})
    os.utime(tmp_path / "record.json", (1, 1))
    one = job(tmp_path, "import os; os.kill(os.getpid(), 9)")
    run_jobs([one], LocalExecutor(settings(), [one]))
    record = json.loads((tmp_path / "record.json").read_text())
    assert "signal 9" in record["error"] and record["metrics"]["a"]["value"] == 1.0 and one.wrote_no_record


def test_how_the_queue_ended_a_job_is_said_even_where_an_earlier_stop_wrote_a_record(tmp_path: Path) -> None:
    one = job(tmp_path)
    one.began = time.time() - 100
    write(tmp_path, status="failed", error="KeyboardInterrupt")
    one.code, one.reason = 1, "SLURM job 7 ended as TIMEOUT"
    one.mark_failure()
    assert json.loads((tmp_path / "record.json").read_text())["error"] == one.reason and one.wrote_no_record


def test_a_job_that_has_to_wait_keeps_its_port(tmp_path: Path) -> None:
    theirs = job(tmp_path, SLEEP, trainer={"accelerator": "cpu", "devices": 2})
    process = theirs.start()
    ours = job(tmp_path, SLEEP, trainer={"accelerator": "cpu", "devices": 2})
    executor = LocalExecutor(settings(), [ours])
    assert executor.admit([ours]) == [] and executor.admit([ours]) == []
    assert process is not None
    stop([process])
    assert list(executor.ports) == [int(ours.environment["MASTER_PORT"])]


@pytest.mark.parametrize("ends", ["os.kill(os.getpid(), 9)", "time.sleep(60)"])
def test_no_rank_outlives_its_job(ends: str, tmp_path: Path) -> None:
    """One that ignores SIGINT, as one in a collective does."""
    rank = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    code = f"""if True:
        import os, subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", {rank!r}], stdout=subprocess.PIPE)
        child.stdout.readline()
        open({str(tmp_path / "pid")!r} + ".part", "w").write(str(child.pid))
        os.rename({str(tmp_path / "pid")!r} + ".part", {str(tmp_path / "pid")!r})
        {ends}"""
    one = job(tmp_path / "run", code)
    executor = LocalExecutor(settings(), [one])
    executor.admit([one])
    while not (tmp_path / "pid").exists():
        time.sleep(0.05)
    child = psutil.Process(int((tmp_path / "pid").read_text()))
    assert child.is_running()
    if "kill" in ends:
        while not executor.ended():
            time.sleep(0.05)
    else:
        executor.stop()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_job_that_another_multirun_runs_is_waited_for_and_not_run_again(tmp_path: Path) -> None:
    write(tmp_path / "example", stages=["infer"])
    record = (tmp_path / "example" / "record.json").read_text()
    theirs = job(
        tmp_path, f"import time; time.sleep(1); open({str(tmp_path / 'record.json')!r}, 'w').write({record!r})"
    )
    process = theirs.start()
    ours = job(tmp_path, f"open({str(tmp_path / 'ran')!r}, 'w')")
    run_jobs([ours], LocalExecutor(settings(), [ours]))
    assert process is not None and ours.code == 0 and not (tmp_path / "ran").exists()


def test_leaving_the_loop_stops_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = job(tmp_path, SLEEP)
    executor = LocalExecutor(settings(), [one])
    started: list[Any] = []

    def interrupted(self: Progress, running: Any) -> None:
        started.extend(executor.running.values())
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "show", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_jobs([one], executor)
    assert started and started[0].poll() is not None


def test_the_board_counts_and_knows_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    jobs = [job(tmp_path / str(number)) for number in range(7)]
    jobs[0].code = 0  # finished before: its time is not known
    progress = Progress(jobs, slots=2)
    assert progress.state() == "1 done, 0 failed, 6 left"
    for one in jobs[1:3]:
        progress.started(one)
    clock[0], jobs[1].code = 100.0, 0
    progress.ended(jobs[1])
    jobs[2].code = 1
    progress.ended(jobs[2])
    assert progress.state() == "2 done, 1 failed, 4 left, 0:03:20 to go"  # 4 jobs of 100 s, two at once
    progress.started(jobs[3])
    clock[0] = 160.0
    assert progress.state().endswith("0:02:50 to go")
    for one in jobs[4:]:
        progress.started(one)
    clock[0] = 400.0
    assert progress.state() == "2 done, 1 failed, 4 left"  # all of them outlast the mean: it tells nothing of them


# -- what the machine holds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """8 cores, no GPU, 10 GB free; `free` can be changed."""
    state: dict[str, Any] = {"free": 10.0, "resident": 0.0}

    class Memory:
        available = property(lambda self: state["free"] * GB)

    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    monkeypatch.setattr(local, "resident", lambda pid: int(state["resident"] * GB))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return state


def trainer(**given: Any) -> dict[str, Any]:
    return {"accelerator": "cpu", "devices": 1, **given}


def test_cores_are_divided(machine: dict[str, Any], tmp_path: Path) -> None:
    def slots_and_threads(n: int, n_jobs: Any, threads: int | None = None, **given: Any) -> tuple[int, int | None]:
        config = {"num_threads": threads, "trainer": trainer(**given)}
        executor = LocalExecutor(settings(n_jobs=n_jobs), [job(tmp_path / str(k), **config) for k in range(n)])
        return executor.slots, executor.threads

    assert slots_and_threads(20, "auto") == (8, 1)
    assert slots_and_threads(2, "auto") == (2, 4)
    assert slots_and_threads(20, "auto", devices=2) == (4, 1)
    assert slots_and_threads(20, "auto", threads=4) == (2, 4)
    assert slots_and_threads(20, 4) == (4, 2)
    assert slots_and_threads(20, 1) == (1, None)  # torch's own choice


def test_memory_is_measured_on_the_first_job_and_then_decides(machine: dict[str, Any], tmp_path: Path) -> None:
    jobs = [job(tmp_path / str(number), SLEEP if number else "", trainer=trainer()) for number in range(6)]
    executor = LocalExecutor(settings(n_jobs="auto"), jobs)
    assert executor.admit(jobs) == jobs[:1] and executor.admit(jobs[1:]) == []
    machine["resident"] = 3.0
    while not executor.ended():
        time.sleep(0.02)
    machine["resident"] = 0.0  # those that start now have taken nothing yet, but are promised 3 GB each
    try:
        assert executor.admit(jobs[1:]) == jobs[1:4]
    finally:
        executor.stop()


def test_memory_that_is_given_is_not_measured(machine: dict[str, Any], tmp_path: Path) -> None:
    jobs = [job(tmp_path / str(number), SLEEP, trainer=trainer()) for number in range(6)]
    executor = LocalExecutor(settings(n_jobs="auto", memory_gb=4), jobs)
    try:
        assert executor.admit(jobs) == jobs[:2]
    finally:
        executor.stop()


def test_gpus_and_ports_are_shared_out(
    machine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    gpu = trainer(accelerator="gpu", devices=2)
    jobs = [job(tmp_path / str(number), SLEEP, trainer=gpu) for number in range(3)]
    executor = LocalExecutor(settings(n_jobs="auto"), jobs)
    try:
        assert executor.admit(jobs) == jobs[:1]  # the first shows its memory
        executor.need = 1.0
        assert executor.admit(jobs[1:]) == jobs[1:2]
    finally:
        executor.stop()
    assert [one.environment["CUDA_VISIBLE_DEVICES"] for one in jobs[:2]] == ["4,5", "6,7"]
    assert len({one.environment["MASTER_PORT"] for one in jobs[:2]}) == 2


# -- SLURM


def slurm(**changed: Any) -> SlurmSettings:
    return checked(SlurmSettings, given("launcher/slurm.yaml", cluster="local", **changed), "hydra.launcher")


def test_what_slurm_is_asked_for(tmp_path: Path) -> None:
    from submitit.slurm.slurm import _make_sbatch_string

    jobs = [job(tmp_path / str(n), trainer=trainer(accelerator="gpu", devices=n)) for n in (1, 4)]
    asked = parameters(slurm(n_jobs=3, options={"partition": "gpu"}, setup=["module load cuda"]), jobs)
    assert (asked["gpus_per_node"], asked["nodes"], asked["tasks_per_node"]) == (4, 1, 1)
    own = {name.removeprefix("slurm_"): value for name, value in asked.items() if name.startswith("slurm_")}
    script = _make_sbatch_string("run", tmp_path, map_count=8, time=asked["timeout_min"], **own)
    for line in ("--partition=gpu", "--array=0-7%3", "--requeue", "--signal=USR2@90", "--time=240"):
        assert f"#SBATCH {line}\n" in script, script
    assert "\nmodule load cuda\n" in script
    assert parameters(slurm(), [job(tmp_path, trainer=trainer())])["gpus_per_node"] is None


@pytest.mark.parametrize(
    ("given", "changed", "says"),
    [
        ({"accelerator": "gpu", "devices": 4}, {"gpus_per_node": 2}, "trainer.devices=4 does not fit"),
        ({"accelerator": "gpu", "devices": "auto"}, {}, "needs hydra.launcher.gpus_per_node"),
        ({"accelerator": "gpu", "devices": [2, 3]}, {}, r"give their number \(2\)"),
    ],
)
def test_more_gpus_than_a_node_gives_are_refused(
    tmp_path: Path, given: dict[str, Any], changed: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        parameters(slurm(**changed), [job(tmp_path, trainer=trainer(**given))])


def test_several_nodes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one node"):
        SlurmExecutor(slurm(), [job(tmp_path, trainer=trainer(num_nodes=2))], tmp_path / "queue")


def test_a_job_that_is_pre_empted_is_stopped_queued_again_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """submitit's local executor: the signal that SLURM sends, the checkpoint, the second start."""
    monkeypatch.setenv("PYTHONPATH", "")
    code = (
        "import pathlib, sys, time\n"
        "with open('starts', 'a') as f: f.write('x')\n"
        "if pathlib.Path('starts').read_text() == 'x':\n"
        "    print('working', flush=True)\n"
        "    try: time.sleep(100)\n"
        "    except KeyboardInterrupt: open('told', 'w'); sys.exit(130)\n"
    )
    monkeypatch.chdir(tmp_path)
    one = job(tmp_path / "run", code, trainer=trainer())
    executor = SlurmExecutor(slurm(), [one], tmp_path / "queue")
    assert executor.admit([one]) == [one]
    limit = time.monotonic() + 120
    while one.last_line() != "working":
        assert time.monotonic() < limit
        time.sleep(0.1)
    for process in psutil.Process(executor.running[one]._process.pid).children(recursive=True):
        process.send_signal(signal.SIGUSR2)  # to all of them, as SLURM does
    while not executor.ended():
        assert time.monotonic() < limit
        time.sleep(0.1)
    assert one.code == 0 and (tmp_path / "told").exists() and (tmp_path / "starts").read_text() == "xx"


def test_a_job_that_the_queue_ends_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 0.5)  # else 15 s, for slow disks
    one = job(tmp_path / "run", SLEEP, trainer=trainer())
    executor = SlurmExecutor(slurm(), [one], tmp_path / "queue")
    executor.admit([one])
    limit = time.monotonic() + 120
    while not one.console.is_file():
        assert time.monotonic() < limit
        time.sleep(0.1)
    executor.stop()
    while not executor.ended():
        assert time.monotonic() < limit
        time.sleep(0.1)
    assert one.code == 1 and one.error().startswith("SLURM job")


def test_a_job_that_crashes_after_its_run_is_whole_stays_finished(tmp_path: Path) -> None:
    """As a GPU library may at the end of the process. The report would leave the run out for ever."""
    one = job(tmp_path)
    write(tmp_path)
    one.began, one.code = 0.0, -signal.SIGSEGV
    one.mark_failure()
    assert one.finished()


def test_a_group_at_another_place_is_another_setting() -> None:
    elsewhere = ["behavior=uppercase", "behavior@vector.behavior=wrong_fact", "+stream@data.benign.more=alpaca"]
    _refuse_collisions([*elsewhere, "stream@data.benign.task=gsm8k", "seed=0,1"])
    with pytest.raises(ConfigError, match=r"behavior@vector\.behavior is given twice"):
        _refuse_collisions([*elsewhere, "behavior@vector.behavior=uppercase"])
    sweeper = SearchSweeper()
    sweeper.parser, sweeper.given = OverridesParser.create(), {"space": {"tune": ["full"]}}
    assert sweeper._narrow(["behavior@vector.behavior=uppercase,wrong_fact"]) == []
    assert list(sweeper.given["space"]) == ["tune", "behavior@vector.behavior"]


def test_a_waiting_thread_keeps_no_core_from_other_jobs(
    machine: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads of an alignment beside another job: 0.3 steps a second where there are 20."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    one = job(tmp_path)
    executor = LocalExecutor(settings(), [one])
    executor.cards = {one: []}
    assert executor._environment(one)["OMP_WAIT_POLICY"] == "PASSIVE"
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert "OMP_WAIT_POLICY" not in executor._environment(one)
