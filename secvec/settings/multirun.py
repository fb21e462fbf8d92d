"""Settings of multiruns: launchers and the search. Values live in conf/hydra/, not here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from secvec.settings.schema import Count, Rate, Seed, Settings


class ProcessSettings(Settings):
    """`hydra/launcher=process`: the jobs of a multirun on this machine."""

    n_jobs: Count | Literal["auto"]
    """At once; `auto`: as many as cores, memory and GPUs hold."""
    memory_gb: Rate | None
    """Of one job, for `n_jobs: auto`; None: measured on the first job, which then runs alone."""


class SlurmSettings(Settings):
    """`hydra/launcher=slurm`: the jobs of a multirun as one array, by submitit."""

    cluster: Literal["slurm", "local"]
    """`local`: this machine, to try it out."""
    n_jobs: Count | None
    """At once; None: as many as the queue lets."""
    timeout_min: Count
    max_timeouts: Annotated[int, Field(ge=0)]
    """How often a job whose time is up is queued again."""
    signal_delay_s: Count
    """Seconds before its end at which a job is told to stop."""
    cpus_per_task: Count
    mem_gb: Rate
    gpus_per_node: Annotated[int, Field(ge=0)] | None
    """For each job; None: its `trainer.devices` if it is to run on GPUs."""
    setup: list[str]
    """Shell lines before the job: modules, environment."""
    options: dict[str, str | int | float | bool]
    """Any other option of sbatch, by its long name: partition, account, qos, constraint, ..."""


class Range(Settings):
    """Numbers from `low` to `high`, both included; whole ones if both are."""

    low: int | float
    high: int | float
    log: bool = False
    """Even in the logarithm."""

    @model_validator(mode="after")
    def _low_is_below_high(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low={self.low} must be below high={self.high}, and above 0 with log=true")
        return self


class Bound(Settings):
    """What a metric must not leave."""

    min: float | None = None
    max: float | None = None


class SearchSettings(Settings):
    """`hydra/sweeper=search`: the settings for which a metric is highest or lowest, others kept within bounds."""

    space: dict[str, Annotated[list[bool | int | float | str], Field(min_length=1)] | Range]
    """Setting or group -> its choices, or the range of a number."""
    metric: str
    direction: Literal["maximize", "minimize"]
    bounds: dict[str, Bound]
    """Metric -> what a trial must keep to count."""
    n_trials: Count
    batch: Count
    """Trials that are chosen at once, before any of them is known; they may run side by side."""
    n_startup_trials: Count
    """Trials at random, before the sampler learns."""
    seed: Seed
    """Of the sampler."""
    seeds: list[Seed] | None
    """Each trial is run with every one of these, and counts by the mean; None: with the run's own seed."""
