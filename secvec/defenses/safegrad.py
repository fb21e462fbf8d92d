"""SafeGrad: where the gradient of the data opposes that of safety, the opposing part is taken out."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar

from secvec.defenses.base import Defense, Need
from secvec.settings.schema import Count, Weight

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secvec.data.batch import Batch
    from secvec.data.example import Example
    from secvec.run import Run


class SafeGrad(Defense):
    """g - min(0, g.s) / |s|^2 s + `weight` s: gradient surgery (Yi et al., arXiv 2508.07172).

    g is the gradient of the data, s that of the alignment loss, KL(base || model) on safe samples, as the paper's
    abstract has it. Our decisions: one projection over all trained parameters; s itself is added with `weight`; the
    safe samples are the starting model's own answers to the vector's prompts, `extra_batch_size` in every batch.
    """

    needs: ClassVar[tuple[Need, ...]] = ("undesired samples", "safe samples", "extra passes")
    uses_samples: bool = True
    keeps_weights: ClassVar[bool] = True
    second_gradient: ClassVar[bool] = True
    extra_batch_size: Count = 8
    weight: Weight = 1.0

    def extra_samples(self, run: Run) -> list[Example]:
        """The starting model's answers to the vector's prompts."""
        return run.own_answers()

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Nats per response token of the data."""
        from secvec.training.losses import data_loss

        return {"loss": data_loss(model, batch)}

    def gradients(self, model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
        """Logged: `cosine` of g and s, below 0 where they conflict; 0 where s is 0, as in the first step."""
        from secvec.training.gradients import gradient_of, inner, present_gradient
        from secvec.training.losses import extra_divergence

        to_the_base = [partial(extra_divergence, model, batch) for batch in batches]
        data, safe = present_gradient(model), gradient_of(model, to_the_base)
        dot, square = inner(model, data, safe), inner(model, safe, safe).clamp_min(1e-30)
        cosine = dot / (square * inner(model, data, data).clamp_min(1e-30)).sqrt()
        factor = self.weight - dot.clamp_max(0) / square
        for gradient, other in zip(data, safe, strict=True):
            gradient += factor.to(other.dtype) * other
        return {"cosine": cosine}
