"""The Lightning logger of one stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from secvec.tracking.base import Tracker


class StageCurves(Logger):
    """Passes what Lightning and its callbacks log to a tracker, from rank 0 alone."""

    def __init__(self, tracker: Tracker, stage: str, resumed: bool):
        super().__init__()
        self.tracker, self.stage = tracker, stage
        self._begin(resumed)

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

    @rank_zero_only
    def _begin(self, resumed: bool) -> None:
        self.tracker.begin_stage(self.stage, resumed)
