"""Security vector (Zhou et al., arXiv 2311.02105): active and frozen while the backbone is fine-tuned."""

from pathlib import Path
from typing import ClassVar

from torch import nn

from secvec.defenses.base import Defense
from secvec.models.vector import attach_frozen_vector


class SecurityVector(Defense):
    """Where the activated model already agrees with an undesired target, the sample gives (almost) no gradient."""

    uses_vector: ClassVar[bool] = True

    dropout: bool = False
    """Whether the frozen vector keeps the dropout it was trained with (`vector.dropout`), as a re-test of the method
    did (arXiv 2405.14577); the method has none."""

    def attach(self, model: nn.Module, vector: Path | None) -> nn.Module:
        """The vector in every forward pass."""
        assert vector is not None, "the finetune stage hands over the vector of the vector stage"
        return attach_frozen_vector(model, vector, keep_dropout=self.dropout)
