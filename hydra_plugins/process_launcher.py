"""Hydra launcher `process`: one operating-system process per job of a multirun, `n_jobs` at a time.

A job that fails, exits or is killed does not take the others with it, and a job may itself be distributed (under
Hydra's own launcher, the second rank of a DDP job would run the whole multirun again). Ends with the report.
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args
from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from secvec.errors import FailedJobs
from secvec.files import write_atomic
from secvec.naming import VARIES

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
QUIET_SECONDS = 10.0
"""Between lines about running jobs where the output is no terminal."""


@dataclass
class ProcessLauncherConf:
    """`hydra/launcher=process`."""

    _target_: str = "hydra_plugins.process_launcher.ProcessLauncher"
    n_jobs: int = 1


ConfigStore.instance().store(group="hydra/launcher", name="process", node=ProcessLauncherConf, provider="secvec")


@dataclass
class Job:
    """One job of the multirun."""

    overrides: list[str]
    config: DictConfig
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    varies: list[str] = field(default_factory=list)
    """Its overrides that the other jobs do not share."""
    code: int | None = None

    @property
    def label(self) -> str:
        """What tells it from the others."""
        return " ".join(self.varies)

    @property
    def console(self) -> Path:
        """What it prints."""
        return self.folder / "console.log"

    def last_line(self) -> str:
        """What it says now: the last line, or state of a progress bar."""
        if not self.console.is_file():
            return "starting"
        with self.console.open("rb") as stream:
            stream.seek(max(0, self.console.stat().st_size - 2000))
            text = stream.read().decode("utf-8", "replace").replace("\x1b[A", "")
        parts = [part.strip() for part in text.replace("\r", "\n").split("\n") if part.strip()]
        return parts[-1][:110] if parts else "starting"

    def error(self) -> str:
        """The message it ended with."""
        text = self.console.read_text(encoding="utf-8", errors="replace") if self.console.is_file() else ""
        _, found, message = text.rpartition("error: ")
        if found:
            return message.strip()
        return "\n".join(text.replace("\r", "\n").strip().splitlines()[-3:]) or f"ended with code {self.code}"


class ProcessLauncher(Launcher):
    """Runs `python SCRIPT OVERRIDES hydra.run.dir=FOLDER` per job and shows how far all of them are."""

    def __init__(self, n_jobs: int = 1) -> None:
        super().__init__()
        self.n_jobs = n_jobs

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's hook."""
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs all jobs; raises FailedJobs at the end when some failed, after the report is written."""
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        sweep = Path(str(self.config.hydra.sweep.dir))
        jobs = self._jobs(job_overrides, sweep)
        sweep.mkdir(parents=True, exist_ok=True)
        try:
            self._run(jobs)
        finally:
            for job in jobs:
                self._stop(job)
            report(sweep)
        failed = [job for job in jobs if job.code]
        if failed:
            lines = [f"{len(failed)} of {len(jobs)} jobs failed; the others are finished:"]
            lines += [f"  {job.label} ({job.console}):\n    " + job.error().replace("\n", "\n    ") for job in failed]
            raise FailedJobs("\n".join(lines), 2 if all(job.code == 2 for job in failed) else 1)
        return [_finished(job) for job in jobs]

    def _jobs(self, job_overrides: Sequence[Sequence[str]], sweep: Path) -> list[Job]:
        """Distinct jobs: a key given twice (by the experiment and on the command line) counts as last given."""
        jobs: dict[Path, Job] = {}
        for given in job_overrides:
            overrides = list({text.partition("=")[0].lstrip("+~"): text for text in given}.values())
            config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = str(len(jobs)), len(jobs)
            folder = sweep / str(config.hydra.sweep.subdir)
            jobs.setdefault(folder, Job(overrides, config, folder))
        shared = set.intersection(*(set(job.overrides) for job in jobs.values())) if len(jobs) > 1 else set()
        for job in jobs.values():
            job.varies = [text for text in filter_overrides(job.overrides) if text not in shared]
        return list(jobs.values())

    def _run(self, jobs: list[Job]) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("elapsed"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[now]}"),
        )  # fmt: skip
        console = Console()
        with Progress(*columns, console=console) as progress:
            whole = progress.add_task("jobs", total=len(jobs), now="")
            waiting, spoken = list(jobs), 0.0
            running: list[Job] = []
            while waiting or running:
                while waiting and len(running) < self.n_jobs:
                    running.append(self._start(waiting.pop(0)))
                time.sleep(POLL_SECONDS)
                for job in [job for job in running if job.process and job.process.poll() is not None]:
                    running.remove(job)
                    job.code = job.process.returncode if job.process else None
                    _mark_failure(job)
                    progress.advance(whole)
                    console.print(
                        f"[{'green' if job.code == 0 else 'red'}]{'done' if job.code == 0 else 'FAILED'}[/] {job.label}"
                    )
                progress.update(
                    whole, now=" | ".join(job.last_line() for job in running) if console.is_terminal else ""
                )
                if not console.is_terminal and time.monotonic() - spoken > QUIET_SECONDS:
                    spoken = time.monotonic()
                    done = len(jobs) - len(waiting) - len(running)
                    for job in running:
                        print(f"[{done}/{len(jobs)} jobs] {job.label}: {job.last_line()}", flush=True)

    def _start(self, job: Job) -> Job:
        job.folder.mkdir(parents=True, exist_ok=True)
        script = str(Path(sys.argv[0]).resolve())
        command = [sys.executable, script, *_flags(), *self._hydra_overrides(), *job.overrides]
        command.append(f"hydra.run.dir='{job.folder}'")
        environment = {**os.environ, VARIES: "\n".join(job.varies)}
        with job.console.open("wb") as out:
            job.process = subprocess.Popen(
                command,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return job

    def _hydra_overrides(self) -> list[str]:
        """Hydra's own settings that a job needs too (search path, logging), not those of the multirun."""
        ours = ("hydra.launcher", "hydra/launcher", "hydra.sweep", "hydra/sweeper", "hydra.mode", "hydra.run.dir")
        given = self.config.hydra.overrides.hydra
        return [text for text in given if not text.lstrip("+~").startswith(ours)]

    @staticmethod
    def _stop(job: Job) -> None:
        """Ends a job that still runs, with the processes it started."""
        if job.process is None or job.process.poll() is not None:
            return
        for sign, wait in ((signal.SIGINT, 20), (signal.SIGKILL, 5)):
            try:
                os.killpg(job.process.pid, sign)
                job.process.wait(wait)
                return
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def _flags() -> list[str]:
    """`--config-dir` and its kin, as they were given."""
    given = get_args()
    names = {"--config-dir": given.config_dir, "--config-path": given.config_path, "--config-name": given.config_name}
    return [text for name, value in names.items() if value for text in (name, value)]


def report(sweep: Path) -> None:
    """Writes the report over the records below `sweep` and says where it is."""
    if any(sweep.glob("*/record.json")):
        subprocess.run([sys.executable, "-m", "secvec.report", str(sweep)], check=False)


def _mark_failure(job: Job) -> None:
    """A job that could not write its own record (killed, out of memory, a wrong setting) still has one."""
    path = job.folder / "record.json"
    written = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if job.code == 0 or written.get("status") == "failed":
        return
    config: dict[str, Any] = OmegaConf.to_container(job.config, resolve=False)  # type: ignore[assignment]
    config.pop("hydra", None)
    names = {key: (config.get(key) or {}).get("name") for key in ("defense", "behavior", "model")}
    known = {"schema": 1, "run": job.folder.name, "stage": config.get("stage"), "seed": config.get("seed"), **names}
    written = {**known, "overrides": job.overrides, "config": config, "metrics": {}, **written}
    written |= {
        "status": "failed",
        "error": job.error() if (job.code or 0) > 0 else f"killed by signal {-(job.code or 0)}",
    }
    write_atomic(path, json.dumps(written, indent=1, default=str) + "\n")


def _finished(job: Job) -> JobReturn:
    result = JobReturn(overrides=job.overrides, cfg=job.config, working_dir=str(job.folder), task_name="train")
    result.status, result.return_value = JobStatus.COMPLETED, None
    return result
