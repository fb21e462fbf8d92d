"""The base of all defenses. A defense decides what is active during fine-tuning, the stage what is trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from secvec.settings.schema import Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secvec.data.batch import Batch
    from secvec.data.example import Example
    from secvec.run import Run

    Mixture = dict[str, list[Example]]


class Defense(Settings):
    """A defense without effect, and the base of all others.

    Its fields are its settings (one yaml in conf/defense/). Only the finetune stage calls its methods.
    """

    name: str
    uses_vector: bool = False
    """Whether the run has a vector stage, which trains the vector for `attach`. A defense without one says
    `uses_vector: false` in its yaml: no setting of the vector then counts for the key of its runs."""

    activation: Literal["auto", "merged", "adapter"] = "auto"
    """How a frozen vector acts on a layer: `adapter` computes Wx + sBAx, `merged` (W + sBA)x, which costs nothing per
    token and has the same gradient with respect to W. `auto`: merged where the sum is exact to float32."""

    needs_labels: ClassVar[bool] = False
    """Whether `loss` must know which rows are undesired: `batch["undesired"]`."""

    refits_vector: ClassVar[bool] = False
    """Whether a new vector is trained on the backbone before each cycle after the first."""

    def check(self, run: Run) -> None:
        """Raises the SecVecError that would stop the methods below; called before anything is trained."""

    def training_samples(self, run: Run, mixture: Mixture) -> Mixture:
        """The samples of a cycle to train on, made from the data's: changed, added to, or some left out. Default: all.

        `mixture` holds lists by kind, `undesired` and `benign`. Only a defense that `needs_labels` may ask which is
        which: in untrusted data nobody knows.
        """
        return mixture

    extra_batch_size: int = 0
    """Rows of `extra_samples` in every batch, beside those of the data: `batch["extra"]` marks them in `loss`."""

    def extra_samples(self, run: Run) -> list[Example]:
        """Samples that are read beside the data, made once before the first training. Default: none."""
        return []

    def attach(self, model: nn.Module, vector: Path | None) -> nn.Module:
        """The model to fine-tune. Everything that the defense adds is frozen.

        `vector` is the adapter folder, if there is one. Default: with `uses_vector` the frozen vector is active in
        every forward pass; else the model is unchanged. Raises ConfigError where `activation` does not suit it.
        """
        if not self.uses_vector:
            return model
        from secvec.models.vector import activate_frozen_vector  # slow to import, and settings need none of it

        assert vector is not None, "the finetune stage passes the vector of the vector stage"
        return activate_frozen_vector(model, vector, self.activation)

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Scalars by name: `loss` is minimised, the others are logged. Default: nats per response token."""
        from secvec.training.losses import response_loss  # slow to import, and settings need none of it

        return {"loss": response_loss(model, batch)}
