"""Jobs on this machine: `n_jobs` at once, or as many as its cores, memory and GPUs hold."""

import os
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from secvec.multirun.job import Job, Process, end_group, stop
from secvec.settings.multirun import ProcessSettings

GB = 2**30
MARGIN = 1.1
"""Factor on the memory of one job, for what the next one takes more."""


class LocalExecutor:
    """Runs jobs as processes side by side, each with its share of the cores, its GPUs and a port of its own."""

    def __init__(self, settings: ProcessSettings, jobs: Sequence[Job]):
        self.measured = settings.n_jobs == "auto"
        self.gpus = visible_gpus() if any(job.trainer.get("accelerator") in ("gpu", "auto") for job in jobs) else []
        processes = max(self._processes(job) for job in jobs)
        cores = len(os.sched_getaffinity(0))
        if settings.n_jobs != "auto":
            self.slots: int = settings.n_jobs
        elif self.gpus:
            self.slots = max(1, len(self.gpus) // processes)
        else:
            self.slots = max(1, cores // max(self._processes(job) * _threads(job) for job in jobs))
        self.slots = min(self.slots, len(jobs))
        self.threads = max(1, cores // (self.slots * processes)) if self.slots > 1 else None
        self.need = (settings.memory_gb or 0.0) * GB
        """Memory of one job in bytes: as set, or the most that a job which ended well took; 0: not known yet."""
        self.running: dict[Job, Process] = {}
        self.memory: dict[Job, int] = {}
        self.peak: dict[Job, int] = {}
        self.cards: dict[Job, list[str]] = {}
        self.ports: set[int] = set()

    def admit(self, waiting: Sequence[Job]) -> list[Job]:
        """Starts the jobs that there is room for."""
        started = []
        for job in waiting:
            if len(self.running) >= self.slots or not self._memory_for_one_more():
                break
            self.cards[job] = self._free_gpus(job)
            job.environment |= self._environment(job)
            # what the server has imported may have asked for the GPUs, and then no fork of it can use them
            forked = not self.gpus and Path(job.command[1]).is_file()
            if (process := job.start(forked=forked)) is not None:
                self.running[job] = process
                started.append(job)
        return started

    def ended(self) -> list[Job]:
        """The jobs that ended since the last call, with their codes."""
        for job in self.running if self.measured else ():
            self.memory[job] = resident(self.running[job].pid)
            self.peak[job] = max(self.peak.get(job, 0), self.memory[job])
        ended = [job for job, process in self.running.items() if process.poll() is not None]
        for job in ended:
            process = self.running.pop(job)
            job.code = process.poll()
            end_group(process)
            if job.code == 0:
                self.need = max(self.need, self.peak.get(job, 0))
        return ended

    def stop(self) -> None:
        """Ends the jobs that still run."""
        stop(list(self.running.values()))

    def _memory_for_one_more(self) -> bool:
        """Whether one more job fits beside the running ones and what they may still take."""
        if not self.measured or not self.running:
            return True
        if not self.need:
            return False  # the first job shows what one takes
        promised = sum(max(0.0, self.need - self.memory.get(job, 0)) for job in self.running)
        return psutil.virtual_memory().available - promised >= MARGIN * self.need

    def _environment(self, job: Job) -> dict[str, str]:
        # jobs share cores: a thread that waits for others must not keep one busy (60 times slower, docs/log.md)
        given: dict[str, str] = {} if "OMP_WAIT_POLICY" in os.environ else {"OMP_WAIT_POLICY": "PASSIVE"}
        if self.threads and "OMP_NUM_THREADS" not in os.environ:
            given["OMP_NUM_THREADS"] = str(self.threads)
        if self._processes(job) > 1:
            given["MASTER_PORT"] = job.environment.get("MASTER_PORT") or str(self._port())
        if self.cards[job]:
            given["CUDA_VISIBLE_DEVICES"] = ",".join(self.cards[job])
        return given

    def _processes(self, job: Job) -> int:
        if job.trainer.get("devices") == "auto" and job.trainer.get("accelerator") != "cpu":
            return max(1, len(self.gpus))
        return job.devices

    def _free_gpus(self, job: Job) -> list[str]:
        """The GPUs that the fewest running jobs use, one for each process of the job."""
        if job.trainer.get("accelerator") == "cpu":
            return []
        used = [card for other in self.running for card in self.cards[other]]
        return sorted(self.gpus, key=used.count)[: self._processes(job)]

    def _port(self) -> int:
        """A free port that no other job of this multirun was given."""
        while True:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port: int = probe.getsockname()[1]
            if port not in self.ports:
                self.ports.add(port)
                return port


def _threads(job: Job) -> int:
    given = job.config.get("num_threads")
    return given if isinstance(given, int) and given > 0 else 1


def visible_gpus() -> list[str]:
    """Names of the GPUs as CUDA_VISIBLE_DEVICES takes them. Does not ask torch, which takes seconds to import."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in given.split(",") if name.strip()]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return []
    return [str(number) for number in range(sum(line.startswith("GPU ") for line in listed.splitlines()))]


def resident(pid: int) -> int:
    """Bytes of memory that a process and those it started hold; 0 when it is gone."""
    total = 0
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.Error):
                total += process.memory_info().rss
    return total
