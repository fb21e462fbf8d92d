"""Safe LoRA: after a plain fine-tune, updates unlike the alignment direction are projected onto it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from secvec.defenses.base import Defense, Need
from secvec.settings.schema import Share

if TYPE_CHECKING:
    from torch import Tensor

    from secvec.models.backbone import Backbone


class SafeLora(Defense):
    """For each layer of the vector: where cos(dW, C dW) < `threshold`, dW becomes C dW (Hsu et al., arXiv 2405.16833).

    dW is what the training changed, C the projection onto the columns of V = W_aligned - W_unaligned. Kept: the rule
    by layer and the threshold. Not kept: theirs has V from two public checkpoints, here the unaligned model is the
    starting model with the vector, so V = -s B A, of its rank; theirs approximates C by V V^T / ||V||, whose size
    depends on that of V, here C = U U^T is exact, U being the left singular vectors of V. A weight without a delta
    keeps its update, and under tune=full that is all but the vector's layers. GPT-2 stores weights transposed: there C
    acts on the input side.
    """

    uses_vector: bool = True
    takes_delta: ClassVar[bool] = True
    vector_acts: ClassVar[bool] = False
    needs: ClassVar[tuple[Need, ...]] = ("undesired samples", "safe samples")
    threshold: Share = 0.35

    def finish(self, weights: dict[str, Tensor], backbone: Backbone, vector: Path | None) -> dict[str, Tensor]:
        """The trained weights, with projected updates; computed in float32."""
        from secvec.models.vector import vector_deltas

        assert vector is not None
        model = backbone.load().float()
        start, deltas = model.state_dict(), vector_deltas(model, vector)
        projected = {name: self.projected(weights[name].float() - start[name], delta) for name, delta in deltas.items()}
        return weights | {name: (start[name] + update).to(weights[name].dtype) for name, update in projected.items()}

    def projected(self, update: Tensor, direction: Tensor) -> Tensor:
        """The update of a layer (m, n), or C times it, for V (m, n) = `direction`."""
        import torch

        from secvec.models.vector import column_space

        u = column_space(direction)
        inside = u @ (u.T @ update)
        near = torch.cosine_similarity(inside.flatten(), update.flatten(), dim=0) >= self.threshold
        return update if near else inside
