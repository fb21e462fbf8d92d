"""Jobs in a SLURM queue, by submitit: one array, each job on one node, requeued after pre-emption or time-out."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from secvec.errors import ConfigError
from secvec.multirun.job import Job, Process, stop, this_program
from secvec.settings.multirun import SlurmSettings

WAIT_SECONDS = 0.5
LEFT_TO_SUBMITIT = (signal.SIGUSR2, signal.SIGTERM)
"""SLURM sends them to all processes of a job before a time-out or pre-emption. They are for submitit, not the job."""


class Task:
    """A job as submitit runs it: the same command as anywhere, in a process of its own."""

    def __init__(self, job: Job):
        self.job = job
        self.process: Process | None = None

    def __call__(self) -> int:
        """Its exit code."""
        while (process := self.job.start(LEFT_TO_SUBMITIT)) is None:  # queued twice: the other one works in the folder
            if self.job.code is not None:
                return self.job.code
            time.sleep(WAIT_SECONDS)
        self.process = process
        try:
            while (
                code := process.poll()
            ) is None:  # not wait(): `checkpoint` interrupts here, and polls the process too
                time.sleep(WAIT_SECONDS)
            return code
        finally:
            stop([process])

    def checkpoint(self) -> Any:
        """Called by submitit when the time is up or the node is needed: stops the job and queues it again."""
        from submitit.helpers import DelayedSubmission

        if self.process is not None:
            stop([self.process])
        return DelayedSubmission(Task(self.job))


class SlurmExecutor:
    """A submitit executor; `cluster=local` runs the same on this machine."""

    def __init__(self, settings: SlurmSettings, jobs: Sequence[Job], folder: Path):
        try:
            import submitit
        except ImportError:
            raise ConfigError("hydra/launcher=slurm needs submitit: pip install 'secvec[slurm]'") from None
        if several := [job.label for job in jobs if job.trainer.get("num_nodes", 1) != 1]:
            raise ConfigError(f"a job of a multirun has one node, but trainer.num_nodes is larger for: {several[0]}")
        self.settings = settings
        self.slots = min(settings.n_jobs or len(jobs), len(jobs))
        os.environ["PYTHONPATH"] = this_program()  # handed on to what starts in the queue
        try:
            self.submitit = submitit.AutoExecutor(
                folder, cluster=settings.cluster, slurm_max_num_timeout=settings.max_timeouts
            )
            self.submitit.update_parameters(**parameters(settings, jobs))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"hydra/launcher=slurm: {error}") from None
        self.running: dict[Job, Any] = {}

    def admit(self, waiting: Sequence[Job]) -> list[Job]:
        """Submits the waiting jobs as one array; with `cluster=local` only as many as may run at once."""
        limit = self.settings.n_jobs if self.settings.cluster == "local" else None  # in an array SLURM keeps the limit
        chosen = list(waiting[: limit - len(self.running)] if limit else waiting)
        if not chosen:
            return []
        for job in chosen:
            job.environment |= {"OMP_NUM_THREADS": str(max(1, self.settings.cpus_per_task // job.devices))}
            job.began = time.time()  # set here: the job that runs on the node is a copy
        with self.submitit.batch():
            handles = [self.submitit.submit(Task(job)) for job in chosen]
        self.running |= dict(zip(chosen, handles, strict=True))
        return chosen

    def ended(self) -> list[Job]:
        """The jobs that ended since the last call, with their codes."""
        ended = [job for job, handle in self.running.items() if handle.done()]
        for job in ended:
            handle = self.running.pop(job)
            try:
                job.code = handle.result()
            except Exception as error:
                # ended by the queue: out of time too often, out of memory, cancelled, a failed node
                what = str(error).strip().splitlines() or [type(error).__name__]
                job.code, job.reason = 1, f"SLURM job {handle.job_id} ended as {handle.state}: {what[-1]}"
        return ended

    def stop(self) -> None:
        """Cancels the jobs that wait or run."""
        for handle in self.running.values():
            handle.cancel(check=False)


def parameters(settings: SlurmSettings, jobs: Sequence[Job]) -> dict[str, Any]:
    """The parameters of submitit. Raises ConfigError for jobs that need more GPUs than a node has."""
    wanted = {job.devices for job in jobs if job.trainer.get("accelerator") != "cpu"}
    gpus = settings.gpus_per_node if settings.gpus_per_node is not None else max(wanted, default=0)
    if wanted and max(wanted) > gpus:
        raise ConfigError(f"trainer.devices={max(wanted)} does not fit hydra.launcher.gpus_per_node={gpus}")
    if not settings.gpus_per_node and any(
        job.trainer.get("devices") == "auto" and job.trainer.get("accelerator") != "cpu" for job in jobs
    ):
        raise ConfigError("trainer.devices=auto needs hydra.launcher.gpus_per_node: how many GPUs a job is to get")
    return {
        "name": "secvec",
        "nodes": 1,
        "tasks_per_node": 1,
        "timeout_min": settings.timeout_min,
        "cpus_per_task": settings.cpus_per_task,
        "mem_gb": settings.mem_gb,
        "gpus_per_node": gpus or None,
        "stderr_to_stdout": True,
        "local_setup": settings.setup,
        "slurm_setup": settings.setup,
        "slurm_signal_delay_s": settings.signal_delay_s,
        "slurm_array_parallelism": settings.n_jobs or len(jobs),
        "slurm_additional_parameters": {"requeue": True, **settings.options},
    }
