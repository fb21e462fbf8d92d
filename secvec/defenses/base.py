"""The base of all defenses. A defense decides what is active during fine-tuning, the stage what is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from secvec.errors import ConfigError
from secvec.settings.schema import Count, LoraSettings, Rate, Settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from secvec.data.batch import Batch
    from secvec.data.example import Example
    from secvec.models.backbone import Backbone
    from secvec.run import Run

    Mixture = dict[str, list[Example]]


Need = Literal["labels", "undesired samples", "safe samples", "extra passes"]
"""What a defense costs beyond the plain fine-tune: to know which training rows are undesired; samples of the behavior
(those of the vector), or their prompts; rows that are known to be safe (KL rows, or answers that the starting model is
made to write); more forward or backward passes in a step."""


class Defense(Settings):
    """A defense without effect, and the base of all others.

    Its fields are its settings (one yaml in conf/defense/). Only the finetune stage calls its methods.
    """

    name: str
    uses_vector: bool = False
    """Whether the run has a vector stage, which trains the vector for `attach`. A defense without one says
    `uses_vector: false` in its yaml: no setting of the vector then counts for the key of its runs."""

    vector_acts: ClassVar[bool] = True
    """Whether the vector of `uses_vector` is active during the fine-tune."""

    takes_delta: ClassVar[bool] = False
    """Whether the vector must be a low-rank delta of linear layers, s B A, and nothing more."""

    shows_vector: ClassVar[bool] = True
    """Whether evaluation shows the trained model with that vector (`active`): not where another one was active."""

    activation: Literal["auto", "merged", "adapter"] = "auto"
    """How a frozen vector acts on a layer: `adapter` computes Wx + sBAx, `merged` (W + sBA)x, which costs nothing per
    token and has the same gradient with respect to W. `auto`: merged where the sum is exact to float32."""

    needs: ClassVar[tuple[Need, ...]] = ()
    """The price of its result, for tables (docs/defenses.md). Only "labels" changes a run: see `needs_labels`."""

    uses_samples: bool = False
    """Whether the defense uses the vector's samples itself. Without a vector its settings count for the key all the
    same, and the yaml says `uses_samples: true`."""

    keeps_weights: ClassVar[bool] = False
    """Whether a copy of the trained weights, as a training finds them, is kept beside the model and in its checkpoints
    (`secvec.models.kept`)."""

    longest_step: ClassVar[int] = 0
    """The step that a plan counts (`batch["step"]`): one of the longest."""

    second_gradient: ClassVar[bool] = False
    """Whether `gradients` computes a second gradient. The loss scaler of 16-mixed does not scale it; it would be 0."""

    refits_vector: ClassVar[bool] = False
    """Whether a new vector is trained on the backbone before each cycle after the first."""

    @property
    def needs_labels(self) -> bool:
        """Whether `loss` must know which rows are undesired: `batch["undesired"]`."""
        return "labels" in self.needs

    def check(self, run: Run) -> None:
        """Raises the SecVecError that would stop the methods below; called before anything is trained.

        Default: with `uses_samples` the vector's samples must suffice and fit, with `takes_delta` the vector be one.
        """
        if self.uses_samples:
            self.check_samples(run)
        if self.takes_delta:
            self._check_delta(run)

    def check_samples(self, run: Run) -> None:
        """Raises the SecVecError for samples of the vector that do not suffice or do not fit."""
        run.data.check(["vector"])
        run.data.fit_to(run.backbone.tokenizer, run.backbone.context, ["vector"])

    @property
    def needs_run(self) -> bool:
        """Whether it overrides `prepared`, `starting` or `training_samples`: only a run calls them."""
        before = ("prepared", "starting", "training_samples")
        return any(getattr(type(self), name) is not getattr(Defense, name) for name in before)

    def _check_delta(self, run: Run) -> None:
        from secvec.models.vector import attach_frozen_vector, attach_new_vector, require_delta

        if folder := run.config.vector.path and run.saved_vector():
            require_delta(attach_frozen_vector(run.backbone.load(), folder))
        else:
            require_delta(attach_new_vector(run.backbone.skeleton(), run.config.vector, 0.0))

    def prepared(self, run: Run) -> Defense:
        """A copy of the defense whose settings name a file that it has made before the first training. Default: itself.

        The key of the training uses the content of that file, not its path.
        """
        return self

    def starting(self, run: Run) -> Backbone:
        """The model that the first fine-tune starts from. Default: that of the run."""
        return run.backbone

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

        `vector` is the adapter folder, if there is one. Default: a frozen vector that `vector_acts` is active in every
        forward pass; without one the model is unchanged. Raises ConfigError where `activation` does not suit it.
        """
        if not (self.uses_vector and self.vector_acts):
            return model
        from secvec.models.vector import activate, attach_frozen_vector  # slow to import, and settings need none of it

        assert vector is not None, "the finetune stage passes the vector of the vector stage"
        return activate(attach_frozen_vector(model, vector), self.activation)

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Scalars by name: `loss` is minimised, the others are logged. Default: nats per response token."""
        from secvec.training.losses import response_loss  # slow to import, and settings need none of it

        return {"loss": response_loss(model, batch)}

    def gradients(self, model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
        """Changes the gradients of an optimizer step in place; returns scalars to log. Default: nothing.

        Called when they are whole: accumulated over `batches`, averaged over processes (or sharded), not yet clipped.
        A gradient of its own is made by `secvec.training.gradients.gradient_of`.
        """
        return {}

    @property
    def finishes(self) -> bool:
        """Whether it overrides `finish`. Only then are all weights in memory at once when they are saved."""
        return type(self).finish is not Defense.finish

    @property
    def changes_backbone(self) -> bool:
        """Whether it changes the backbone's weights itself, before the fine-tune or after it."""
        return self.finishes or type(self).starting is not Defense.starting

    def finish(self, weights: dict[str, Tensor], backbone: Backbone, vector: Path | None) -> dict[str, Tensor]:
        """The weights to save in `backbone/`, made from those that a training gave. Default: these.

        Called at the end of every cycle, by the first process alone, with whole tensors on the CPU under their Hugging
        Face names, a task LoRA merged. `backbone` is the model that the training started from.
        """
        return weights


@dataclass(frozen=True)
class Preparation:
    """A training of the starting model that a defense needs before the fine-tune: see `Run.prepare`."""

    defense: Defense
    """What is attached in it, its loss and its gradients."""
    samples: Sequence[Example]
    extra: Sequence[Example] = ()
    """Rows that are read beside the samples, `defense.extra_batch_size` in a batch."""
    epochs: int = 1
    batch_size: int = 8
    lr: float = 1e-4
    vector: Path | None = None
    tune: LoraSettings | None = None
    """The LoRA that is trained; None: the whole model."""


class AlignmentStageDefense(Defense):
    """The base of defenses that train the starting model once more before it meets the data.

    The fine-tune that follows is the plain one. This training reads the starting model's own answers to the vector's
    prompts (its refusals, as far as it refuses) and the vector's KL rows; beside them, where `undesired_batch_size` is
    given, the vector's undesired samples.
    """

    needs: ClassVar[tuple[Need, ...]] = ("undesired samples", "safe samples")
    uses_samples: bool = True
    epochs: Count = 5
    batch_size: Count = 16
    lr: Rate
    undesired_batch_size: int = 0

    def hardening(self) -> Defense:
        """The defense whose loss and gradients make this training: each subclass has its own."""
        raise NotImplementedError

    def starting(self, run: Run) -> Backbone:
        """The starting model after this training, which other runs find in the cache.

        Raises ConfigError where there are no safe rows.
        """
        samples = run.data.vector_samples
        rows = [*run.own_answers(), *samples["kl"]]
        if not rows:
            raise ConfigError(
                f"defense={self.name} has no safe rows: the starting model has no usable answer to any of the vector's "
                "prompts, and there are no KL rows. Give some (vector.num_kl and vector.kl_weight above 0)"
            )
        undesired = samples["undesired"] if self.undesired_batch_size else []
        hardening = self.hardening().model_copy(update={"extra_batch_size": self.undesired_batch_size})
        plan = Preparation(hardening, rows, undesired, self.epochs, self.batch_size, self.lr)
        return run.backbone.at(run.prepare(plan) / "backbone")


class ChangesActivations(Defense):
    """Changes the output of one layer, at all tokens and in training mode alone, by the activations of a trait.

    The vector's samples have the trait, and the starting model's own answers to the same prompts have it not. Their
    activations are means over response tokens, (N, H), row by row of the same prompts.
    """

    needs: ClassVar[tuple[Need, ...]] = ("undesired samples", "safe samples")
    uses_samples: bool = True
    layer: int | None = None
    """From 0; None: the middle one."""
    activations: Path | None = None
    """Made by `prepared`."""

    def check(self, run: Run) -> None:
        """Raises ConfigError for a layer that the model lacks."""
        from secvec.training.activations import layer_at

        super().check(run)
        layer_at(run.backbone.skeleton(), self.layer)

    def prepared(self, run: Run) -> ChangesActivations:
        """With the activations of the starting model."""
        return self.model_copy(update={"activations": run.activations(self.layer)})

    def attach(self, model: nn.Module, vector: Path | None) -> nn.Module:
        """The model, changed in training mode."""
        from safetensors.torch import load_file

        from secvec.training.activations import change_outputs

        assert self.activations is not None, "the finetune stage prepares the defense"
        change_outputs(model, self.layer, self.trait(**load_file(self.activations)), self.changed)
        return model

    def trait(self, undesired: Tensor, own: Tensor) -> Tensor:
        """What the trait is in activations, from two times (N, H)."""
        raise NotImplementedError

    def changed(self, hidden: Tensor, trait: Tensor) -> Tensor:
        """Activations (..., H) for training."""
        raise NotImplementedError
