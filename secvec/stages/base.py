"""What a stage is: what it trains, builds, minimises, saves and shows, and how a run goes through it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from secvec.data.batch import Batch, Encoded
from secvec.data.draw import data_hash
from secvec.defenses.base import Defense
from secvec.models.vector import check_adapter
from secvec.runs.keys import content_key
from secvec.settings.schema import VectorLora

if TYPE_CHECKING:
    from secvec.data.datamodule import SecVecDataModule
    from secvec.data.example import Example
    from secvec.models.backbone import Backbone
    from secvec.module import SecVecModule
    from secvec.planning.budget import Budget
    from secvec.run import Run


@dataclass(frozen=True)
class Workload:
    """What a stage computes: `secvec.planning` estimates FLOPs, memory, time and disk from it."""

    part: str | None = None  # that is trained
    trained: int = 0  # parameters
    adapters: int = 0  # parameters beside the backbone while it trains
    attach: Callable[[nn.Module], nn.Module] = field(default=lambda model: model, compare=False)
    loss: Callable[[nn.Module, Batch], dict[str, Tensor]] = field(default=Defense(name="none").loss, compare=False)
    gradients: Callable[[nn.Module, list[Batch]], object] = field(default=lambda *_: None, compare=False)
    keeps_weights: bool = False
    step: int = 0  # the one that is counted, where they differ
    samples: Mapping[str, int] = field(default_factory=dict)  # of an epoch, by kind
    epochs: int = 1
    batch_size: int = 1
    kl_batch_size: int = 0
    probe_every: int = 0  # steps between two probes of the telemetry
    on_one_device: bool = False  # trains on one device, one batch a step
    prompts: int = 0  # to answer
    scored: int = 0  # test samples that only get a loss
    saved: Mapping[str, tuple[str, int]] = field(default_factory=dict)  # by part: what it is, how many copies


class Stage(ABC):
    """A stage of the method. It has no state: what it works on is in the module, the data and the run."""

    name: ClassVar[str]
    learning_rate: ClassVar[str] = ""
    """The setting that is its learning rate, for messages."""
    artifacts: ClassVar[tuple[str, ...]] = ()
    """What it leaves in the run folder; removed before the stage runs again."""
    measures: ClassVar[tuple[str, ...]]
    """Prefixes of its metrics; those of an earlier try go before the stage runs."""
    shown: ClassVar[tuple[str, ...]] = ()
    """Prefixes of the metrics in the table at its end; those that it measures if it names none."""

    def check_vector(self, vector: VectorLora | Mapping[str, Any] | str | Path | None) -> VectorLora | Path | None:
        """The `vector` argument of the module as this stage needs it. Raises ValueError and ArtifactError."""
        if vector is None:
            return None
        if not isinstance(vector, str | Path):
            raise ValueError(f"stage={self.name} takes the folder of a trained vector, got the settings of a new one")
        check_adapter(Path(vector))
        return Path(vector)

    def default_lr(self, vector: object, tune: object) -> float:
        """The learning rate of `SecVecModule` where its `optimizer` is None: those of conf/recipe/llm.yaml."""
        return 1e-4  # of a stage that trains nothing, so that no step has it

    @abstractmethod
    def part(self, module: SecVecModule) -> str | None:
        """The part of the model that is trained: `vector`, `task`, `backbone`, or None."""

    @abstractmethod
    def prepare(self, module: SecVecModule, backbone: nn.Module) -> nn.Module:
        """`backbone` with all that is attached to it."""

    def loss(self, module: SecVecModule, batch: Batch) -> dict[str, Tensor]:
        """Scalars; `loss` is minimised, the others are logged."""
        raise ValueError(f"stage={self.name} trains nothing: use Trainer.predict or Trainer.validate")

    def keeps_weights(self, module: SecVecModule) -> bool:
        """Whether the trained weights are kept as they are at the start (`secvec.models.kept`)."""
        return False

    def gradients(self, module: SecVecModule, batches: list[Batch]) -> dict[str, Tensor]:
        """Changes the gradients of a step, accumulated over `batches`, before they are clipped; scalars to log."""
        return {}

    def streams(self, data: SecVecDataModule, module: SecVecModule) -> list[tuple[Sequence[Encoded], int]]:
        """The streams of training rows, each with its rows per global batch."""
        raise ValueError(f"stage={self.name} trains nothing: it has no training data")

    @abstractmethod
    def check(self, run: Run) -> None:
        """Raises what would stop the stage, as far as it can be known; called for all stages before the first trains.

        All samples are drawn, compared and made to fit before (`SecVecDataModule.check` and `fit_to`).
        """

    def save(self, module: SecVecModule, folder: Path) -> None:
        """Writes what was trained below `folder`. Every process must call it; the first one writes."""
        raise ValueError(f"stage={self.name} trains nothing: there is nothing to save")

    @abstractmethod
    def plan(self, budget: Budget) -> Workload:
        """What the stage computes under the settings of a planned run."""

    @abstractmethod
    def run(self, run: Run) -> None:
        """Runs the stage in a run folder: from the artifacts of the stage before to its own, with its metrics."""


SHAPING = {"optimizer", "scheduler", "trainer", "num_threads", "callbacks", "seed"}
"""Settings of a run that shape every training."""


def training_key(run: Run, backbone: Backbone, examples: Iterable[Example], recipe: Any) -> str:
    """The key of a training: of the model, the samples, `recipe` (the stage's own settings, its rate too) and SHAPING.

    Callbacks may stop a training by what they see of the held-out samples, so with any these count too.
    """
    config = run.config
    seen = run.data.validation(config.evaluation.validation.num_samples) if config.callbacks else {}
    held_out = data_hash([example for examples in seen.values() for example in examples])
    settings = config.model_dump(mode="json", include=SHAPING)
    del settings["optimizer"]["lr"]
    return content_key([backbone.identity, data_hash(examples), held_out, recipe, settings])
