"""Buffer-and-Reinforce: a task LoRA is trained with the vector active, then a LoRA of refusals is merged into it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from secvec.defenses.base import Defense, Need, Preparation
from secvec.errors import ConfigError
from secvec.settings.schema import Count, Rate

if TYPE_CHECKING:
    from torch import Tensor

    from secvec.models.backbone import Backbone
    from secvec.run import Run


class BufferAndReinforce(Defense):
    """W + dU + `weight` (I - Q Q^T) dR, with dU the task LoRA, dR the ReinforceLoRA (Ham et al., arXiv 2605.24550).

    The vector is their BufferLoRA: active and frozen while the task LoRA (their UserLoRA) is trained, then taken off.
    The ReinforceLoRA is trained on the starting model, under the vector too, to refuse. No code is public, and we have
    read the abstract alone. Our decisions: it has the settings of the task LoRA and learns the starting model's own
    answers to the vector's prompts; Q is an orthonormal basis of the columns of dU, the Q of a QR decomposition of the
    task LoRA's B, so that what is merged lies outside what the task LoRA writes to.
    """

    uses_vector: bool = True
    uses_samples: bool = True
    needs: ClassVar[tuple[Need, ...]] = ("undesired samples", "safe samples")
    epochs: Count = 5
    batch_size: Count = 16
    lr: Rate
    weight: Rate = 1.0
    reinforce: Path | None = None
    """Made by `prepared`."""
    rank: int = 0
    """Of the task LoRA, by `prepared`: rounding makes no update of exactly that rank."""

    def check(self, run: Run) -> None:
        """Raises ConfigError for a fine-tune of the whole backbone, whose update leaves no other direction."""
        if run.config.tune.lora is None:
            raise ConfigError(f"defense={self.name} merges into a task LoRA: give tune=lora")
        super().check(run)

    def prepared(self, run: Run) -> BufferAndReinforce:
        """With the ReinforceLoRA."""
        vector, rows = run.saved_vector(), run.own_answers()
        buffer, tune = Defense(name=self.name, uses_vector=True), run.config.tune.lora
        plan = Preparation(buffer, rows, (), self.epochs, self.batch_size, self.lr, vector, tune)
        return self.model_copy(update={"reinforce": run.prepare(plan) / "task", "rank": tune.r})

    def finish(self, weights: dict[str, Tensor], backbone: Backbone, vector: Path | None) -> dict[str, Tensor]:
        """Computed in float32."""
        from transformers.pytorch_utils import Conv1D

        from secvec.models.vector import vector_deltas

        assert self.reinforce is not None, "the finetune stage prepares the defense"
        model = backbone.load().float()
        start, deltas = model.state_dict(), vector_deltas(model, self.reinforce)
        turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}  # (in, out)
        found = {}
        for name, reinforce in deltas.items():
            update = weights[name].float() - start[name]
            if name in turned:
                merged = outside(update.T, reinforce.T, self.rank).T
            else:
                merged = outside(update, reinforce, self.rank)
            found[name] = (weights[name].float() + self.weight * merged).to(weights[name].dtype)
        return weights | found


def outside(update: Tensor, other: Tensor, rank: int) -> Tensor:
    """The part of `other` whose columns are orthogonal to those of `update`, a matrix of that rank; both (out, in)."""
    from secvec.models.vector import column_space

    basis = column_space(update, rank)
    return other - basis @ (basis.T @ other)
