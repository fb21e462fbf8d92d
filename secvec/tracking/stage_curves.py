"""Lightning's logger of one stage, for any tracker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from secvec.tracking.base import Tracker


class StageCurves(Logger):
    """Hands on what Lightning and callbacks log, from rank 0."""

    def __init__(self, tracker: Tracker, stage: str, resumed: bool):
        super().__init__()
        self.tracker, self.stage = tracker, stage
        self._begin(resumed)

    @property
    def name(self) -> str:
        """Of the logger."""
        return "secvec"

    @property
    def version(self) -> str:
        """The stage whose curves it hands on."""
        return self.stage

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The config is the run's, not the stage's: a tracker gets it when the run begins."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Values after optimizer step `step`; Lightning's count of epochs is no metric."""
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        if values:
            self.tracker.curves(self.stage, step or 0, values)

    @rank_zero_only
    def _begin(self, resumed: bool) -> None:
        self.tracker.begin_stage(self.stage, resumed)
