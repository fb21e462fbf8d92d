"""Hydra sweeper `search`: finds the settings with the highest or lowest value of a metric (secvec.multirun.search)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from secvec.config.resolvers import setting_of
from secvec.errors import ConfigError, FailedJobs
from secvec.multirun.run import report
from secvec.multirun.search import Search, Trial
from secvec.runs.record import Record
from secvec.settings.messages import checked
from secvec.settings.multirun import SearchSettings


class SearchSweeper(Sweeper):
    """Runs trials in batches by the chosen launcher. Each trial is an ordinary run with its record."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra. Raises ConfigError for wrong settings."""
        if config.get("plan"):
            raise ConfigError("plan: a search does not know its trials beforehand: leave -m out to plan a single run")
        given: dict[str, Any] = OmegaConf.to_container(config.hydra.sweeper, resolve=True)  # type: ignore[assignment]
        given.pop("_target_")
        self.given, self.hydra, self.parser = given, config.hydra, OverridesParser.create(hydra_context.config_loader)
        launcher: Any = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )
        self.launcher = launcher
        launcher.one_call = False  # the report is written once, at the end

    def sweep(self, arguments: list[str]) -> list[Trial]:
        """Runs the search; finished trials are not run again. Raises FailedJobs when no trial ended well."""
        configure_log(self.hydra.hydra_logging, self.hydra.verbose)
        fixed = self._narrow(arguments)
        settings = checked(SearchSettings, self.given, "hydra.sweeper")
        if settings.seeds and any(name == "seed" for name in [*settings.space, *(f.partition("=")[0] for f in fixed)]):
            raise ConfigError("seed is given beside hydra.sweeper.seeds: leave one of them out")
        search, folder, launched = Search(settings), Path(str(self.hydra.sweep.dir)), 0
        assert self.launcher is not None
        try:
            while batch := search.ask():
                jobs = [[*fixed, *overrides] for trial in batch for overrides in _overrides(trial, settings.seeds)]
                returned = self.launcher.launch(jobs, initial_job_idx=launched)
                launched += len(jobs)
                records = [_record(Path(str(result.working_dir))) for result in returned]
                size = len(jobs) // len(batch)
                for number, trial in enumerate(batch):
                    search.tell(trial, records[number * size : (number + 1) * size])
                search.save(folder / "search.json")
                print(_progress(search), flush=True)
        finally:
            report_code = report(folder)
        print(search.table(), folder / "search.json", sep="\n", flush=True)
        if all(trial.value is None for trial in search.trials):
            raise FailedJobs(f"no trial of the search ended well; the last one: {search.trials[-1].error}", 1)
        if report_code:
            raise FailedJobs("the search ended well, but there is no report of it: see above", report_code)
        return search.trials

    def _narrow(self, arguments: Sequence[str]) -> list[str]:
        """Takes what the command line gives out of the space and returns it; a sweep there becomes the choices."""
        fixed: list[str] = []
        for override in self.parser.parse_overrides(list(arguments)):
            key = setting_of(override)
            if override.is_sweep_override() and not override.is_discrete_sweep():
                raise ConfigError(f"{override.input_line}: give a range in hydra.sweeper.space, as {{low: 0, high: 1}}")
            if override.is_sweep_override():
                self.given["space"] = {**self.given["space"], key: list(override.sweep_string_iterator())}
            else:
                self.given["space"].pop(key, None)
                fixed.append(override.input_line or "")
        return fixed


def _record(folder: Path) -> Record:
    return Record.find(folder) or Record(run=folder.name, status="failed", error="it left no record")


def _overrides(trial: Trial, seeds: Sequence[int] | None) -> list[list[str]]:
    """The overrides of each job of a trial: one job for each seed."""
    chosen = [f"{name}={_text(value)}" for name, value in trial.params.items()]
    return [[*chosen, f"seed={seed}"] for seed in seeds] if seeds else [chosen]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _progress(search: Search) -> str:
    settings, best = search.settings, search.best()
    state = f"search: {len(search.trials)} of {settings.n_trials} trials"
    failed = sum(trial.value is None for trial in search.trials)
    state += f", {failed} failed" if failed else ""
    if best is None or best.value is None:
        return f"{state}, none within the bounds yet"
    chosen = " ".join(f"{name}={_text(value)}" for name, value in best.params.items())
    return f"{state}, best {settings.metric} {best.value:.4g} ({chosen})"
