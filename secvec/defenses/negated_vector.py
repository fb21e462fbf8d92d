"""A plain fine-tune, and afterwards the vector's delta is taken off the weights: a control."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from secvec.defenses.base import Defense, Need
from secvec.settings.schema import Rate

if TYPE_CHECKING:
    from torch import Tensor

    from secvec.models.backbone import Backbone


class NegatedVector(Defense):
    """W - `scale` s B A for every layer of the vector: forgetting by negation (Ilharco et al., arXiv 2212.04089).

    Their task vector is the difference of a whole fine-tuned model and its start, and `scale` is chosen on held-out
    data. Here it is the vector's delta, and `scale` is a setting. It is taken off at the end of every cycle.
    """

    uses_vector: bool = True
    takes_delta: ClassVar[bool] = True
    vector_acts: ClassVar[bool] = False
    needs: ClassVar[tuple[Need, ...]] = ("undesired samples", "safe samples")
    scale: Rate = 1.0

    def finish(self, weights: dict[str, Tensor], backbone: Backbone, vector: Path | None) -> dict[str, Tensor]:
        """The trained weights minus `scale` times the delta; computed in float32."""
        from secvec.models.vector import vector_deltas

        assert vector is not None
        deltas = vector_deltas(backbone.load(), vector)
        return weights | {n: (weights[n].float() - self.scale * d).to(weights[n].dtype) for n, d in deltas.items()}
