"""Hydra launchers: each job of a multirun in a process of its own, on this machine or in a SLURM queue.

A job that fails or is killed does not stop the others, and a job may be distributed itself (under Hydra's own launcher
the second rank of a DDP job would run the whole multirun again). A multirun ends with its report.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.utils import get_args
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from secvec.config.resolvers import setting_of, sweep_name
from secvec.errors import ConfigError, FailedJobs
from secvec.multirun.job import Job
from secvec.multirun.local import LocalExecutor
from secvec.multirun.run import Executor, report, run_jobs, show_plans
from secvec.multirun.slurm import SlurmExecutor
from secvec.runs.keys import NOT_IN_KEY, VARIES
from secvec.runs.record import Record
from secvec.settings.messages import checked
from secvec.settings.multirun import ProcessSettings, SlurmSettings
from secvec.settings.schema import Settings
from secvec.settings.trainer import LoggerSettings


class ProcessLauncher(Launcher):
    """Runs `python SCRIPT OVERRIDES hydra.run.dir=FOLDER` for each job that is not finished yet.

    SCRIPT is what started the multirun: train.py, or the installed command.
    """

    schema: ClassVar[type[Settings]] = ProcessSettings

    def __init__(self, **_: Any) -> None:
        super().__init__()
        self.one_call = True
        """Whether one call of `launch` is the whole multirun. It then writes the report and raises for failed jobs."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra. Raises ConfigError for wrong settings and for a key that is given twice."""
        self.hydra_context, self.config = hydra_context, config
        given: dict[str, Any] = OmegaConf.to_container(config.hydra.launcher, resolve=True)  # type: ignore[assignment]
        given.pop("_target_")
        self.settings = checked(self.schema, given, "hydra.launcher")
        _refuse_collisions(list(config.hydra.overrides.task))

    def executor(self, jobs: Sequence[Job], sweep: Path) -> Executor:
        """What runs the jobs of the multirun in folder `sweep`."""
        assert isinstance(self.settings, ProcessSettings)
        return LocalExecutor(self.settings, jobs)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs the jobs that are not finished. Returns one result for each item of `job_overrides`.

        Raises FailedJobs at the end when some failed, after the report is written. `+plan=true` prints the plan of
        each job instead and writes nothing.
        """
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        sweep = Path(str(self.config.hydra.sweep.dir))
        try:
            job_of_each = self._jobs(job_overrides, sweep, initial_job_idx)
        except Exception:
            _remove_unused(sweep)
            raise
        HydraConfig.instance().set_config(self.config)  # the configuration is composed: see report_user_errors
        jobs = list(dict.fromkeys(job_of_each))
        if self.config.get("plan"):
            try:
                show_plans(jobs)
            finally:
                _remove_unused(sweep)
            return [_result(job) for job in job_of_each]
        sweep.mkdir(parents=True, exist_ok=True)
        for job in jobs:
            job.code = 0 if job.finished() else None
        try:
            run_jobs(jobs, self.executor(jobs, sweep))
            for job in jobs:
                if job.wrote_no_record:
                    _track_failure(job)
        finally:
            report_code = report(sweep) if self.one_call else 0
        if (error := _failure(jobs)) and self.one_call:
            raise error
        if report_code:
            raise FailedJobs("the jobs ended well, but there is no report of them: see above", report_code)
        return [_result(job) for job in job_of_each]

    def _jobs(self, job_overrides: Sequence[Sequence[str]], sweep: Path, first: int) -> list[Job]:
        """One job for each item, the same one for the same run. Raises ConfigError for two jobs in one folder."""
        jobs: dict[Path, Job] = {}
        job_of_each = []
        for given in job_overrides:
            # what an experiment sets and the command line sets too counts as on the command line, which is last
            overrides = list({text.partition("=")[0].lstrip("+~"): text for text in given}.values())
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
            with open_dict(composed):
                composed.hydra.job.id, composed.hydra.job.num = str(first + len(jobs)), first + len(jobs)
            job = self._job(overrides, composed, sweep / str(composed.hydra.sweep.subdir))
            other = jobs.setdefault(job.folder, job)
            if (other.key, _not_in_key(other)) != (job.key, _not_in_key(job)):
                texts = [" ".join(filter_overrides(one.overrides)) for one in (other, job)]
                raise ConfigError(
                    f"two jobs of the multirun would share the folder {job.folder}:\n  {texts[0]}\n  {texts[1]}\n"
                    "they differ only in settings that do not change results (stage, logger, ...): give these in two "
                    "commands, one after the other"
                )
            job_of_each.append(other)
        shared = set.intersection(*(set(job.overrides) for job in jobs.values())) if len(jobs) > 1 else set()
        for job in jobs.values():
            varies = [text for text in filter_overrides(job.overrides) if text not in shared]
            job.label, job.environment[VARIES] = " ".join(varies), "\n".join(varies)
        return job_of_each

    def _job(self, overrides: list[str], composed: DictConfig, folder: Path) -> Job:
        config: dict[str, Any] = OmegaConf.to_container(composed, resolve=False)  # type: ignore[assignment]
        config = {name: value for name, value in config.items() if name not in ("hydra", "key")}
        config["sweep"] = composed.sweep or sweep_name(self.config)
        script = str(Path(sys.argv[0]).resolve())
        command = [sys.executable, script, *_flags(), *self._hydra_overrides(), *overrides]
        command += [f"sweep='{config['sweep']}'", f"hydra.run.dir='{folder}'"]
        return Job(overrides, config, composed.key, folder, command)

    def _hydra_overrides(self) -> list[str]:
        """The `hydra.` overrides that a job needs too (search path, logging), without those of the multirun."""
        ours = ("hydra.launcher", "hydra/launcher", "hydra.sweep", "hydra/sweeper", "hydra.mode", "hydra.run.dir")
        given = self.config.hydra.overrides.hydra
        return [text for text in given if not text.lstrip("+~").startswith(ours)]


def _remove_unused(sweep: Path) -> None:
    """Removes the folder of a multirun that holds nothing but the config that Hydra writes before it has any job."""
    for folder in sweep.glob("*/"):
        with suppress(OSError):
            folder.rmdir()  # only if empty
    if sweep.is_dir() and [file.name for file in sweep.iterdir()] == ["multirun.yaml"]:
        (sweep / "multirun.yaml").unlink()
        with suppress(OSError):
            sweep.rmdir()


class SlurmLauncher(ProcessLauncher):
    """Runs the same jobs as one SLURM array."""

    schema: ClassVar[type[Settings]] = SlurmSettings

    def executor(self, jobs: Sequence[Job], sweep: Path) -> Executor:
        """The queue, with its files in the folder of the multirun."""
        assert isinstance(self.settings, SlurmSettings)
        return SlurmExecutor(self.settings, jobs, sweep / ".submitit")


def _flags() -> list[str]:
    """`--config-dir`, `--config-path` and `--config-name` as they were given."""
    given = get_args()
    names = {"--config-dir": given.config_dir, "--config-path": given.config_path, "--config-name": given.config_name}
    return [text for name, value in names.items() if value for text in (name, value)]


def _refuse_collisions(given: Sequence[str]) -> None:
    """Raises ConfigError for a key that is given twice with different values."""
    first: dict[str, str] = {}
    for override in OverridesParser.create().parse_overrides(list(given)):
        key, text = setting_of(override), override.input_line or ""
        if first.setdefault(key, text) != text:
            raise ConfigError(f"{key} is given twice, {first[key]} and {text}: leave one of them out")


def _not_in_key(job: Job) -> dict[str, Any]:
    return {name: value for name, value in job.config.items() if name in NOT_IN_KEY}


def _failure(jobs: Sequence[Job]) -> FailedJobs | None:
    failed = [job for job in jobs if job.code]
    if not failed:
        return None
    lines = [f"{len(failed)} of {len(jobs)} jobs failed; the others are finished:"]
    lines += [f"  {job.label} ({job.console}):\n    " + job.error().replace("\n", "\n    ") for job in failed]
    return FailedJobs("\n".join(lines), 2 if all(job.code == 2 for job in failed) else 1)


def _track_failure(job: Job) -> None:
    """Sends the failure of a job that could not send it itself (killed, wrong settings) to the job's tracker."""
    from secvec.tracking.session import send_failure  # slow to import

    with suppress(ConfigError):
        settings = checked(LoggerSettings, job.config.get("logger", {}), "logger")
        record = Record.find(job.folder)
        if record and settings.model_dump(exclude={"csv"}, exclude_none=True):
            record.overrides = job.environment[VARIES].split("\n")
            send_failure(job.folder, record, settings)


def _result(job: Job) -> JobReturn:
    result = JobReturn(overrides=job.overrides, cfg=OmegaConf.create(job.config), working_dir=str(job.folder))
    result.status, result.return_value = JobStatus.COMPLETED, None
    if job.code:
        result.status, result.return_value = JobStatus.FAILED, RuntimeError(job.error())
    return result
