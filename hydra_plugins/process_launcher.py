"""Hydra launchers: every job of a multirun in a process of its own, on this machine or in a SLURM queue.

A job that fails, exits or is killed does not take the others with it, and a job may itself be distributed (under
Hydra's own launcher, the second rank of a DDP job would run the whole multirun again). Ends with the report.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.utils import get_args
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from secvec.cli import started
from secvec.errors import ConfigError, FailedJobs
from secvec.multirun.job import Job, read_record
from secvec.multirun.local import LocalExecutor
from secvec.multirun.run import Executor, report, run_jobs, show_plans
from secvec.multirun.slurm import SlurmExecutor
from secvec.runs.keys import VARIES
from secvec.settings.messages import checked
from secvec.settings.schema import LoggerSettings, ProcessSettings, Settings, SlurmSettings


class ProcessLauncher(Launcher):
    """Runs `python SCRIPT OVERRIDES hydra.run.dir=FOLDER` per job that is not finished yet."""

    schema: ClassVar[type[Settings]] = ProcessSettings

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.alone = True
        """Whether one call of `launch` is the whole multirun: then it ends with the report, and with what failed."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's hook. Raises ConfigError for wrong settings and for overrides that collide."""
        self.hydra_context, self.config = hydra_context, config
        given: dict[str, Any] = OmegaConf.to_container(config.hydra.launcher, resolve=True)  # type: ignore[assignment]
        given.pop("_target_")
        self.settings = checked(self.schema, given, "hydra.launcher")
        _refuse_collisions(list(config.hydra.overrides.task))

    def executor(self, jobs: Sequence[Job], sweep: Path) -> Executor:
        """Where they run."""
        assert isinstance(self.settings, ProcessSettings)
        return LocalExecutor(self.settings, jobs)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs what is missing; one result per item of `job_overrides`.

        Raises FailedJobs at the end when some failed, after the report is written. Under `+plan=true` it shows what
        every job would take, and writes nothing.
        """
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        sweep = Path(str(self.config.hydra.sweep.dir))
        asked = self._jobs(job_overrides, sweep, initial_job_idx)
        started()
        jobs = list(dict.fromkeys(asked))
        if self.config.plan:
            show_plans(jobs)
            return [_returned(job) for job in asked]
        sweep.mkdir(parents=True, exist_ok=True)
        for job in jobs:
            job.code = 0 if job.finished() else None
        try:
            run_jobs(jobs, self.executor(jobs, sweep))
            for job in jobs:
                if job.unsaid:
                    _tell_tracker(job)
        finally:
            unreported = report(sweep) if self.alone else 0
        if (error := _failure(jobs)) and self.alone:
            raise error
        if unreported:
            raise FailedJobs("the jobs ended well, but there is no report of them: see above", unreported)
        return [_returned(job) for job in asked]

    def _jobs(self, job_overrides: Sequence[Sequence[str]], sweep: Path, first: int) -> list[Job]:
        """One job per item, the same object for the same run. Raises ConfigError for two runs in one folder."""
        jobs: dict[Path, Job] = {}
        asked = []
        for given in job_overrides:
            # what an experiment sets and the command line sets too counts as on the command line, which is last
            overrides = list({text.partition("=")[0].lstrip("+~"): text for text in given}.values())
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
            with open_dict(composed):
                composed.hydra.job.id, composed.hydra.job.num = str(first + len(jobs)), first + len(jobs)
            job = self._job(overrides, composed, sweep / str(composed.hydra.sweep.subdir))
            other = jobs.setdefault(job.folder, job)
            if other.config != job.config:
                texts = [" ".join(filter_overrides(one.overrides)) for one in (other, job)]
                raise ConfigError(
                    f"two jobs of the multirun would share the folder {job.folder}:\n  {texts[0]}\n  {texts[1]}\n"
                    "they differ only in what does not shape results (stage, logger, ...): run one after the other"
                )
            asked.append(other)
        shared = set.intersection(*(set(job.overrides) for job in jobs.values())) if len(jobs) > 1 else set()
        for job in jobs.values():
            varies = [text for text in filter_overrides(job.overrides) if text not in shared]
            job.label, job.environment[VARIES] = " ".join(varies), "\n".join(varies)
        return asked

    def _job(self, overrides: list[str], composed: DictConfig, folder: Path) -> Job:
        config: dict[str, Any] = OmegaConf.to_container(composed, resolve=False)  # type: ignore[assignment]
        config = {name: value for name, value in config.items() if name not in ("hydra", "content")}
        config["sweep"] = composed.sweep  # may stand for other settings
        script = str(Path(sys.argv[0]).resolve())
        command = [sys.executable, script, *_flags(), *self._hydra_overrides(), *overrides]
        return Job(overrides, config, composed.content, folder, [*command, f"hydra.run.dir='{folder}'"])

    def _hydra_overrides(self) -> list[str]:
        """Hydra's own settings that a job needs too (search path, logging), not those of the multirun."""
        ours = ("hydra.launcher", "hydra/launcher", "hydra.sweep", "hydra/sweeper", "hydra.mode", "hydra.run.dir")
        given = self.config.hydra.overrides.hydra
        return [text for text in given if not text.lstrip("+~").startswith(ours)]


class SlurmLauncher(ProcessLauncher):
    """The same as one SLURM array."""

    schema: ClassVar[type[Settings]] = SlurmSettings

    def executor(self, jobs: Sequence[Job], sweep: Path) -> Executor:
        """The queue."""
        assert isinstance(self.settings, SlurmSettings)
        return SlurmExecutor(self.settings, jobs, sweep / ".submitit")


def _flags() -> list[str]:
    """`--config-dir` and its kin, as they were given."""
    given = get_args()
    names = {"--config-dir": given.config_dir, "--config-path": given.config_path, "--config-name": given.config_name}
    return [text for name, value in names.items() if value for text in (name, value)]


def _refuse_collisions(given: Sequence[str]) -> None:
    """Raises ConfigError for a key that the command line gives twice with different values."""
    first: dict[str, str] = {}
    for override in OverridesParser.create().parse_overrides(list(given)):
        key, text = override.key_or_group, override.input_line or ""
        if first.setdefault(key, text) != text:
            raise ConfigError(f"{key} is given twice, {first[key]} and {text}: leave one of them out")


def _failure(jobs: Sequence[Job]) -> FailedJobs | None:
    failed = [job for job in jobs if job.code]
    if not failed:
        return None
    lines = [f"{len(failed)} of {len(jobs)} jobs failed; the others are finished:"]
    lines += [f"  {job.label} ({job.console}):\n    " + job.error().replace("\n", "\n    ") for job in failed]
    return FailedJobs("\n".join(lines), 2 if all(job.code == 2 for job in failed) else 1)


def _tell_tracker(job: Job) -> None:
    """Failed means failed, also where the job was killed or its settings were wrong. Not where those of the logger are:
    there is nobody to tell then, and the report says so."""
    from secvec.tracking.session import send_failure  # slow to import

    with suppress(ConfigError):
        settings = checked(LoggerSettings, job.config["logger"], "logger")
        if settings.name != "csv":
            named = {"overrides": job.environment[VARIES].split("\n")}
            send_failure(job.folder, read_record(job.folder) | named, settings)


def _returned(job: Job) -> JobReturn:
    result = JobReturn(overrides=job.overrides, cfg=OmegaConf.create(job.config), working_dir=str(job.folder))
    result.status, result.return_value = JobStatus.COMPLETED, None
    if job.code:
        result.status, result.return_value = JobStatus.FAILED, RuntimeError(job.error())
    return result
