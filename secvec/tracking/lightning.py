"""Any logger of Lightning as a tracker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secvec.runs.record import Record
from secvec.tracking.base import Tracker


class LightningTracker(Tracker):
    """Passes settings, curves and outcomes to `logger`. Loggers of Lightning have no calls for tables and artifacts."""

    def __init__(self, logger: Any):
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
