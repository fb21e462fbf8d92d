"""Watching the mechanism while the backbone is fine-tuned: losses with the vector on and off, gradients, drift."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor, nn

from secvec.data.batch import Batch, Encoded, collate, count_together
from secvec.metrics import Measurement, Measurements
from secvec.models.modes import recomputed
from secvec.models.sharding import local_shard, over_shards, reshard
from secvec.models.vector import has_vector, vector_off
from secvec.training.callbacks import EverySteps
from secvec.training.gradients import gradient_of, inner
from secvec.training.losses import response_loss

if TYPE_CHECKING:
    from secvec.module import SecVecModule


class Telemetry(EverySteps):
    """Every `every_n_steps` optimizer steps, on fixed probe rows of the fine-tuning data per kind:

    - `telemetry/<kind>/loss_on`, `loss_off`: nats per response token with the vector as trained, and without it;
    - `telemetry/undesired/suppression_ratio`: |g_on| / |g_off|, norms of the full gradient of the trained parameters on
      the undesired rows: how much of the push towards the behavior the vector lets through (the paper's mechanism 1);
    - `telemetry/<kind>/cosine_with_extra`, where the defense reads extra rows: the cosine of the gradient on the rows
      with that on the extra ones, which are read without the vector. Below 0 the two pull apart;
    - `telemetry/drift`: |theta - theta_0| / |theta_0| over the trained parameters (for a task LoRA, whose start is
      B = 0 and a random A, this is relative to the random A).

    Without a vector, on equals off. `batch_size`: rows that are read at once.
    """

    prefix = "telemetry"

    def __init__(
        self,
        probes: Mapping[str, Sequence[Encoded]],
        every_n_steps: int,
        extra: Sequence[Encoded] = (),
        batch_size: int = 32,
    ):
        super().__init__(every_n_steps)
        self.batches = {kind: _batches(rows, batch_size) for kind, rows in probes.items() if rows}
        self.extra = _batches(extra, batch_size)
        self.last: dict[str, float] = {}

    def setup(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        """Drift is counted from the weights before the first step."""
        module.keep_start = True

    def metrics(self) -> Measurements:
        """The last values that a record holds: single numbers, without an interval."""
        single = {"drift": "drift", "undesired/suppression_ratio": "suppression_ratio"}
        values = {name: self.last[key] for key, name in single.items() if key in self.last}
        return {name: Measurement(value) for name, value in values.items()}

    def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
        """Before the last checkpoint: a run that goes on from it trains no more, and knows the record's numbers."""
        if trainer.current_epoch + 1 == trainer.max_epochs:
            self.log_now(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"last": self.last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.last = state_dict["last"]

    def measure(self, trainer: L.Trainer, module: SecVecModule) -> dict[str, float]:
        """The values as they are now."""
        model = module.model
        module.zero_grad(set_to_none=True)  # the gradient of the last training step has been used, but is still there
        values: dict[str, float] = {}
        extra: list[Tensor] = []
        if self.extra:
            with vector_off(model):
                extra, _ = self._gradient(module, self.extra)
        norm_extra = _norm(model, extra) if extra else 0.0
        for kind, batches in self.batches.items():
            undesired = kind == "undesired"
            gradient, values[f"{kind}/loss_on"] = self._gradient(module, batches, undesired or bool(extra))
            norm_on = norm_off = _norm(model, gradient) if gradient else 0.0
            values[f"{kind}/loss_off"] = values[f"{kind}/loss_on"]
            if extra:
                both = norm_on * norm_extra
                values[f"{kind}/cosine_with_extra"] = float(inner(model, gradient, extra)) / both if both else math.nan
            if has_vector(model):
                with vector_off(model):
                    gradient, values[f"{kind}/loss_off"] = self._gradient(module, batches, undesired)
                norm_off = _norm(model, gradient) if gradient else 0.0
            if undesired:
                values["undesired/suppression_ratio"] = norm_on / norm_off if norm_off else math.nan
        reshard(model)
        moved = [_square(local_shard(p).detach().cpu() - module.start[name]) for name, p in module.trained()]
        start = [_square(tensor) for tensor in module.start.values()]
        values["drift"] = float((_total(module, moved) / _total(module, start)) ** 0.5)
        self.last = values
        return values

    def _gradient(
        self, module: SecVecModule, batches: Sequence[Batch], wanted: bool = True
    ) -> tuple[list[Tensor], float]:
        """The gradient of the loss on `batches` where it is `wanted`, and the loss; leaves no gradient behind."""
        found: list[float] = []

        def loss(batch: Batch) -> Tensor:
            with module.trainer.precision_plugin.forward_context():
                loss = response_loss(module.model, batch)
            found.append(float(loss.detach()))
            return loss

        gradient: list[Tensor] = []
        if wanted:
            with recomputed(module.model):
                gradient = gradient_of(module.model, [partial(loss, batch) for batch in batches])
        else:
            with torch.no_grad():
                for batch in batches:
                    loss(batch)
        return gradient, sum(found) / len(found)


def _batches(rows: Sequence[Encoded], size: int) -> list[Batch]:
    batches = [collate([(row, False) for row in rows[i : i + size]]) for i in range(0, len(rows), size)]
    count_together(batches)
    return batches


def _norm(model: nn.Module, gradient: Sequence[Tensor]) -> float:
    return float(inner(model, gradient, gradient) ** 0.5)


def _square(tensor: Tensor) -> Tensor:
    return tensor.double().square().sum()


def _total(module: SecVecModule, squares: Sequence[Tensor]) -> Tensor:
    """Sum over tensors, and over processes when each holds a shard."""
    return over_shards(torch.stack([square.to(module.device) for square in squares]).sum(), module)
