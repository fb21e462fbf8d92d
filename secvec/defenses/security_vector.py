"""Security vector (Zhou et al., arXiv 2311.02105): active and frozen while the backbone is fine-tuned."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from secvec.defenses.base import Defense
from secvec.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


class SecurityVector(Defense):
    """Where the activated model already agrees with an undesired target, the sample gives (almost) no gradient."""

    uses_vector: bool = True
    activation: Literal["auto", "merged", "adapter"] = "auto"
    """How the frozen vector acts on a layer: `adapter` computes Wx + sBAx, `merged` (W + sBA)x, which costs nothing per
    token and has the same gradient with respect to W. `auto`: merged where the sum is exact to float32."""

    def attach(self, model: nn.Module, vector: Path | None) -> nn.Module:
        """The model with the frozen vector. Raises ConfigError where `merged` is asked for and is not the same."""
        from secvec.models import vector as vectors  # slow to import, and settings need none of it

        attached = super().attach(model, vector)
        faults = vectors.why_not_merged(attached)
        if faults and self.activation == "merged":
            raise ConfigError(f"defense.activation=merged: {'; '.join(faults)}. Set defense.activation=adapter")
        if not faults and self.activation != "adapter":
            vectors.merge_activation(attached)
        return attached


class RefittedVector(SecurityVector):
    """A security vector that is trained again, on the current backbone, before each cycle after the first."""

    refits_vector: ClassVar[bool] = True
