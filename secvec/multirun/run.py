"""The loop of a multirun: starts its jobs, marks those that fail, shows the progress, writes the report."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as ProgressBar

from secvec.errors import FailedJobs
from secvec.multirun.job import Job, this_program

POLL_SECONDS = 0.2
QUIET_SECONDS = 10.0
"""Time between lines about running jobs where the output is no terminal."""


class Executor(Protocol):
    """Where jobs run."""

    slots: int
    """How many jobs may run at once."""

    def admit(self, waiting: Sequence[Job]) -> list[Job]:
        """Starts the jobs that there is room for, and returns them."""

    def ended(self) -> list[Job]:
        """The jobs that ended since the last call, with their codes."""

    def stop(self) -> None:
        """Ends the jobs that still run."""


def run_jobs(jobs: Sequence[Job], executor: Executor) -> None:
    """Runs the jobs without an exit code until all have one. Stops the running jobs when it is interrupted."""
    progress = Progress(jobs, executor.slots)
    waiting, running = [job for job in jobs if job.code is None], list[Job]()
    with progress.bar:
        try:
            while waiting or running:
                for job in executor.admit(waiting):
                    waiting.remove(job)
                    running.append(job)
                    progress.started(job)
                for job in [job for job in waiting if job.code is not None]:  # another multirun has run it
                    waiting.remove(job)
                    progress.ended(job)
                progress.show(running)
                time.sleep(POLL_SECONDS)
                for job in executor.ended():
                    running.remove(job)
                    job.mark_failure()
                    progress.ended(job)
        finally:
            executor.stop()


def show_plans(jobs: Sequence[Job]) -> None:
    """Prints the plan of each job. Raises FailedJobs when some could not run."""
    for job in jobs:
        print(f"\n# {job.label}", flush=True)
        job.code = subprocess.run(job.command, check=False).returncode
    if failed := [job.label for job in jobs if job.code]:
        raise FailedJobs(f"{len(failed)} of {len(jobs)} jobs would fail: {'; '.join(failed)}", 2)


def report(sweep: Path) -> int:
    """Writes the report over the runs in `sweep`, prints where it is, or why there is none. Returns its exit code."""
    if not any(sweep.glob("*/record.json")):
        return 0
    command = [sys.executable, "-m", "secvec.report", str(sweep)]
    return subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": this_program()}).returncode


class Progress:
    """Prints how many jobs are done, failed and left, and the time left: a bar on a terminal, lines elsewhere."""

    def __init__(self, jobs: Sequence[Job], slots: int):
        self.jobs, self.slots = jobs, slots
        self.console = Console()
        columns = (TextColumn("jobs"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"))
        self.bar = ProgressBar(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("", total=len(jobs))
        self.began: dict[Job, float] = {}
        self.seconds: list[float] = []
        """Of the jobs that ended well here."""
        self.last_printed = 0.0
        if before := sum(job.code == 0 for job in jobs):
            self.console.print(f"{before} of {len(jobs)} jobs are finished already")

    def started(self, job: Job) -> None:
        """Starts the clock of a job."""
        self.began[job] = time.monotonic()

    def ended(self, job: Job) -> None:
        """Prints one line about a job that ended."""
        if job.code == 0 and job in self.began:
            self.seconds.append(time.monotonic() - self.began[job])
        word = "[green]done[/]" if job.code == 0 else "[red]FAILED[/]"
        self.console.print(f"{word} {escape(job.label)}  ({self.state()})", highlight=False, soft_wrap=True)

    def state(self) -> str:
        """`3 done, 1 failed, 2 left, 0:01:20 to go`."""
        done, failed = sum(job.code == 0 for job in self.jobs), sum(bool(job.code) for job in self.jobs)
        text = f"{done} done, {failed} failed, {len(self.jobs) - done - failed} left"
        seconds = self.seconds_left()
        return text if seconds is None else f"{text}, {timedelta(seconds=seconds)} to go"

    def seconds_left(self) -> int | None:
        """Estimated by the mean of the jobs that ended well here; None before the first, and once all outlast it."""
        if not self.seconds:
            return None
        mean, now = sum(self.seconds) / len(self.seconds), time.monotonic()
        left = [job for job in self.jobs if job.code is None]
        spent = [min(mean, now - self.began[job]) for job in left if job in self.began]
        return round((mean * len(left) - sum(spent)) / min(self.slots, max(1, len(left)))) or None

    def show(self, running: Sequence[Job]) -> None:
        """Shows the state, and the last line of each running job."""
        if self.console.is_terminal:
            now = " | ".join(job.last_line() for job in running)
            ended = sum(job.code is not None for job in self.jobs)
            self.bar.update(self.task, completed=ended, description=f"{self.state()}  {escape(now)}")
        elif time.monotonic() - self.last_printed > QUIET_SECONDS:
            self.last_printed = time.monotonic()
            for job in running:
                print(f"[{self.state()}] {job.label}: {job.last_line()}", flush=True)
