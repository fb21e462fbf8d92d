"""Between trackers and Lightning: any of its loggers as a tracker, and a tracker as the logger of a stage."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from secvec.runs.processes import main_process
from secvec.runs.record import Record
from secvec.tracking.base import Tracker


class LightningTracker(Tracker):
    """Passes settings, curves and outcomes to `logger`. Loggers of Lightning have no calls for tables and artifacts."""

    def __init__(self, logger: Logger):
        self.logger = logger

    def open(self, record: Record) -> None:
        """Logs the config as hyperparameters."""
        self.logger.log_hyperparams(dict(record.config))

    def curves(self, stage: str, step: int, values: Mapping[str, float]) -> None:
        """Logs `STAGE/NAME` at `step`."""
        self.logger.log_metrics({f"{stage}/{name}": value for name, value in values.items()}, step)

    def outcomes(self, values: Mapping[str, float]) -> None:
        """Logs each under its plain name."""
        self.logger.log_metrics(dict(values))

    def close(self, record: Record) -> None:
        """Ends the run of the logger as `success` or `failed`."""
        self.logger.save()
        self.logger.finalize("success" if record.status == "completed" else "failed")


class StageCurves(Logger):
    """Passes what Lightning and its callbacks log to a tracker, from rank 0 alone."""

    def __init__(self, tracker: Tracker, stage: str, resumed: bool):
        super().__init__()
        self.tracker, self.stage = tracker, stage
        if main_process():
            tracker.begin_stage(stage, resumed)

    @property
    def name(self) -> str:
        """Folder in the run folder where callbacks of Lightning write, as ModelCheckpoint does."""
        return "stages"

    @property
    def version(self) -> str:
        """The name of the stage: the folder below that one."""
        return self.stage

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: a tracker gets the config of the whole run when that begins."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Passes on values after optimizer step `step`, without Lightning's own `epoch`: see `train/epoch`."""
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        if values:
            self.tracker.curves(self.stage, step or 0, values)
