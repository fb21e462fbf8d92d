"""A random adapter of the vector's norm: a control."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from secvec.defenses.base import Defense, Need

if TYPE_CHECKING:
    from torch import nn


class RandomAdapter(Defense):
    """As the security vector, with random weights: it shows that what the vector has learned matters, not its size.

    The control of arXiv 2606.30252 (norm-matched random adapter). In each layer ||B A|| (Frobenius) is that of the
    vector; A and B are drawn from a normal distribution, by the seed of the run.
    """

    uses_vector: bool = True
    takes_delta: ClassVar[bool] = True
    shows_vector: ClassVar[bool] = False
    needs: ClassVar[tuple[Need, ...]] = ("undesired samples", "safe samples")

    def attach(self, model: nn.Module, vector: Path | None) -> nn.Module:
        """The model with the random adapter, active and frozen. Raises ConfigError for a vector that is no B A."""
        import torch  # slow to import, and settings need none of it

        from secvec.models.vector import randomize_vector

        attached = super().attach(model, vector)
        randomize_vector(attached, torch.Generator().manual_seed(torch.initial_seed()))  # that of the training
        return attached
