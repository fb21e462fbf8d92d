"""Booster: the starting model is trained so that a step on undesired samples gains little."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from secvec.defenses.base import AlignmentStageDefense, Defense
from secvec.errors import ConfigError
from secvec.settings.schema import Count, Rate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secvec.data.batch import Batch
    from secvec.run import Run


class Booster(AlignmentStageDefense):
    """Before the fine-tune: min f(w) + `weight` (h(w) - h(w - `step` dh/|dh|)) (Huang et al., arXiv 2409.01586).

    f is the alignment loss, h the loss on undesired samples. As theirs, the gradient takes the inner step for a
    constant: df(w) + `weight` (dh(w) - dh(w - `step` dh(w)/|dh(w)|)). Three passes in every step. Theirs is a LoRA on
    thousands of rows; ours are the vector's samples.
    """

    second_gradient: ClassVar[bool] = True
    undesired_batch_size: Count = 16
    weight: Rate = 5.0
    step: Rate = 0.1

    def check(self, run: Run) -> None:
        """Raises ConfigError for weights in bfloat16 too: the simulated step would be lost in their rounding."""
        super().check(run)
        if run.config.model.dtype != "float32" or run.config.trainer.precision == "bf16-true":
            raise ConfigError(
                "defense=booster takes float32 weights: its simulated step is smaller than the rounding of bfloat16: "
                "set model.dtype=float32, and trainer.precision=32-true or bf16-mixed"
            )

    def hardening(self) -> Defense:
        """The gradient with the simulated step."""
        return Attenuated(name=self.name, weight=self.weight, step=self.step)


class Attenuated(Defense):
    """What a step on undesired samples would gain is made small."""

    weight: Rate
    step: Rate

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Nats per response token of the safe rows."""
        from secvec.training.losses import data_loss

        return {"loss": data_loss(model, batch)}

    def gradients(self, model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
        """Logged: `undesired_norm`, that of the gradient on the undesired samples."""
        import torch

        from secvec.models.sharding import local_shard, reshard
        from secvec.training.gradients import gradient_of, inner, present_gradient
        from secvec.training.losses import extra_loss

        losses = [partial(extra_loss, model, batch) for batch in batches]
        now = gradient_of(model, losses)
        norm = inner(model, now, now).sqrt().clamp_min(1e-30)
        weights = [local_shard(p.detach()) for p in model.parameters() if p.requires_grad]
        before = [weight.clone() for weight in weights]
        with torch.no_grad():
            for weight, gradient in zip(weights, now, strict=True):
                weight -= (self.step / norm).to(gradient.dtype) * gradient
        reshard(model)
        after = gradient_of(model, losses)
        with torch.no_grad():
            for weight, old in zip(weights, before, strict=True):
                weight.copy_(old)
        reshard(model)
        for gradient, one, other in zip(present_gradient(model), now, after, strict=True):
            gradient += self.weight * (one - other)
        return {"undesired_norm": norm}
