"""A Lightning callback that notes when the steps of a training end: `+callbacks.clock._target_=clock.StepClock`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import lightning as L


class StepClock(L.Callback):
    """Writes seconds since the epoch into `file`: the ends of all steps, one list for each epoch."""

    def __init__(self, file: str):
        self.file = Path(file)
        self.epochs: list[list[float]] = []

    def on_train_epoch_start(self, *_: Any) -> None:
        """The time between two epochs is not that of a step."""
        self.epochs.append([])

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        """The optimizer has made its step."""
        self.epochs[-1].append(time.time())

    def on_train_end(self, *_: Any) -> None:
        """Before anything is saved."""
        self.file.write_text(json.dumps(self.epochs), encoding="utf-8")
