"""A multirun from its jobs to their ends: what is finished is left alone, what fails is marked, all of it is shown."""

from __future__ import annotations

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
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from secvec.errors import FailedJobs
from secvec.multirun.job import Job, this_program

POLL_SECONDS = 0.2
QUIET_SECONDS = 10.0
"""Between lines about running jobs where the output is no terminal."""


class Executor(Protocol):
    """Where jobs run."""

    slots: int
    """Jobs at once."""

    def admit(self, waiting: Sequence[Job]) -> list[Job]:
        """Starts the jobs that there is room for, and returns them."""

    def ended(self) -> list[Job]:
        """The jobs that ended since the last call, with their codes."""

    def stop(self) -> None:
        """Ends the jobs that still run."""


def run_jobs(jobs: Sequence[Job], executor: Executor) -> None:
    """Runs what is missing until every job has a code. Jobs that still run when it is left are stopped."""
    board = Board(jobs, executor.slots)
    waiting, running = [job for job in jobs if job.code is None], list[Job]()
    with board.progress:
        try:
            while waiting or running:
                for job in executor.admit(waiting):
                    waiting.remove(job)
                    running.append(job)
                    board.started(job)
                for job in [job for job in waiting if job.code is not None]:  # another multirun has run it
                    waiting.remove(job)
                    board.ended(job)
                board.show(running)
                time.sleep(POLL_SECONDS)
                for job in executor.ended():
                    running.remove(job)
                    job.mark_failure()
                    board.ended(job)
        finally:
            executor.stop()


def show_plans(jobs: Sequence[Job]) -> None:
    """What each job would take, one after the other. Raises FailedJobs for those that could not run."""
    for job in jobs:
        print(f"\n# {job.label}", flush=True)
        job.code = subprocess.run(job.command, check=False).returncode
    if failed := [job.label for job in jobs if job.code]:
        raise FailedJobs(f"{len(failed)} of {len(jobs)} jobs would fail: {'; '.join(failed)}", 2)


def report(sweep: Path) -> int:
    """Writes the report over the records below `sweep` and says where it is, or why not; its exit code."""
    if not any(sweep.glob("*/record.json")):
        return 0
    command = [sys.executable, "-m", "secvec.report", str(sweep)]
    return subprocess.run(command, check=False, env=os.environ | {"PYTHONPATH": this_program()}).returncode


class Board:
    """How far a multirun is: done, failed, left, and the time left. A bar, or lines where there is no terminal."""

    def __init__(self, jobs: Sequence[Job], slots: int):
        self.jobs, self.slots = jobs, slots
        self.console = Console()
        columns = (TextColumn("jobs"), BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"))
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.bar = self.progress.add_task("", total=len(jobs))
        self.began: dict[Job, float] = {}
        self.seconds: list[float] = []
        """Of the jobs that ended well here."""
        self.spoken = 0.0
        if before := sum(job.code == 0 for job in jobs):
            self.console.print(f"{before} of {len(jobs)} jobs are finished already")

    def started(self, job: Job) -> None:
        """Its time runs."""
        self.began[job] = time.monotonic()

    def ended(self, job: Job) -> None:
        """One line for it."""
        if job.code == 0 and job in self.began:
            self.seconds.append(time.monotonic() - self.began[job])
        word = "[green]done[/]" if job.code == 0 else "[red]FAILED[/]"
        self.console.print(f"{word} {escape(job.label)}  ({self.state()})", highlight=False, soft_wrap=True)

    def state(self) -> str:
        """`3 done, 1 failed, 2 left, 0:01:20 to go`."""
        done, failed = sum(job.code == 0 for job in self.jobs), sum(bool(job.code) for job in self.jobs)
        left = len(self.jobs) - done - failed
        text = f"{done} done, {failed} failed, {left} left"
        seconds = self.seconds_left()
        return text if seconds is None else f"{text}, {timedelta(seconds=seconds)} to go"

    def seconds_left(self) -> int | None:
        """By the mean of the jobs that ended well here; None before the first, and when the rest outlast it."""
        if not self.seconds:
            return None
        mean, now = sum(self.seconds) / len(self.seconds), time.monotonic()
        left = [job for job in self.jobs if job.code is None]
        spent = [min(mean, now - self.began[job]) for job in left if job in self.began]
        return round((mean * len(left) - sum(spent)) / min(self.slots, max(1, len(left)))) or None

    def show(self, running: Sequence[Job]) -> None:
        """What goes on now."""
        over = sum(job.code is not None for job in self.jobs)
        if self.console.is_terminal:
            now = " | ".join(job.last_line() for job in running)
            self.progress.update(self.bar, completed=over, description=f"{self.state()}  {escape(now)}")
        elif time.monotonic() - self.spoken > QUIET_SECONDS:
            self.spoken = time.monotonic()
            for job in running:
                print(f"[{self.state()}] {job.label}: {job.last_line()}", flush=True)
