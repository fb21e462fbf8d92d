"""The settings of a whole run: those of its parts, and the plug-ins that it uses. The shape of `conf/`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import DirectoryPath, Field, FilePath, model_validator

from secvec.behaviors.base import Behavior
from secvec.data.example import Stream
from secvec.defenses.base import Defense
from secvec.errors import nearest
from secvec.judges.base import Judge
from secvec.settings.logger import LoggerSettings
from secvec.settings.optimizer import OptimizerSettings, SchedulerSettings
from secvec.settings.plugin import Plugin
from secvec.settings.schema import (
    BUILT_IN,
    BaseGateSettings,
    Count,
    EvaluationSettings,
    FinetuneSettings,
    GateSettings,
    GenerationSettings,
    ModelSettings,
    PathSettings,
    Rate,
    Seed,
    Settings,
    Share,
    Stage,
    TuneSettings,
    VectorLora,
    Weight,
)
from secvec.settings.trainer import CallbackSettings, TelemetrySettings, TrainerSettings
from secvec.training.optim import check_optimization


class AlignSettings(Settings):
    """How a model is taught to refuse the behavior before anything else: a fine-tune without a defense."""

    num_undesired: Count
    """Undesired prompts, each answered by a refusal."""
    num_benign: Count
    """Benign samples, divided equally among the streams of `data.benign` that are no new task."""
    epochs: Count
    batch_size: Count
    lr: Rate
    seed: Seed
    """Of the weights and the data of the aligned model. It is not the run's seed: runs of all seeds share the model."""
    num_threads: Count | None = None
    """CPU threads of torch while aligning; None: as in training. Other jobs wait for the model and leave cores free."""
    gate: BaseGateSettings | None = None
    """None: not checked."""
    behavior: Plugin[Behavior] | None = None
    """The behavior whose wanted answers are taught; None: the run's. So one model can serve several behaviors."""


class StartingModelSettings(ModelSettings):
    """The backbone, and how it is aligned before the run."""

    align: AlignSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _recipe_is_for_the_built_in_weights(cls, data: Any) -> Any:
        """With weights of your own, `model=tiny` loses its name and its alignment, which suit only the tiny model."""
        if isinstance(data, dict) and data.get("name") in BUILT_IN and data.get("name_or_path"):
            return {**data, "name": None, "align": None}
        return data


class VectorSettings(VectorLora):
    """The security vector and how it is trained (arXiv 2311.02105, stage 1)."""

    name: str = "vector"
    """Shown in reports."""
    path: DirectoryPath | None = None
    """A trained vector to use as it is; then no vector is trained."""
    behavior: Plugin[Behavior] | None = None
    """The behavior it is trained on; None: the run's. Another one shows what else a vector protects from."""
    num_samples: Count
    """Undesired samples that it is trained on."""
    split: Literal["vector", "finetune"] = "vector"
    """The split they come from. `finetune` holds the attack's own samples, which a defender does not have."""
    loss_on: Literal["response", "all"] = "response"
    """Tokens in the loss; `all`: those of the prompt too."""
    num_kl: Annotated[int, Field(ge=0)]
    """Benign samples of the KL term."""
    epochs: Count
    """Passes over the undesired samples."""
    batch_size: Count
    kl_batch_size: Count
    lr: Rate
    gate: GateSettings


class DataSettings(Settings):
    """The fine-tuning mixture: undesired samples of the behavior and benign samples of the streams."""

    file: FilePath | None = None
    """Rows of which nobody knows which are undesired; `evaluate.py metrics=scan` scores them."""
    num_harmful: int = Field(ge=0)
    num_benign: int = Field(ge=0)
    harmful_ratio: Share | None = None
    """If given, it divides the num_harmful + num_benign samples instead."""
    labelled: bool | None = None
    """Whether the defense is told which samples are undesired; None: if it needs to know."""
    benign: dict[str, Plugin[Stream]] = Field(default_factory=dict)
    """Streams by name, which share `num_benign`. Their order decides which samples are drawn."""
    weights: dict[str, Weight] | None = None
    """Share of each stream, by its name; None: equal."""

    @property
    def counts(self) -> tuple[int, int]:
        """Exact numbers of (undesired, benign) samples in the mixture."""
        total = self.num_harmful + self.num_benign
        if self.harmful_ratio is None:
            return self.num_harmful, self.num_benign
        harmful = round(total * self.harmful_ratio)
        return harmful, total - harmful

    @property
    def streams(self) -> list[Stream]:
        """The benign streams in order."""
        return list(self.benign.values())

    @property
    def stream_weights(self) -> list[float] | None:
        """The weights in the order of `streams`; None: equal."""
        return None if self.weights is None else [self.weights[name] for name in self.benign]

    @model_validator(mode="after")
    def _each_stream_has_a_weight(self) -> DataSettings:
        if self.weights is None:
            return self
        if unknown := sorted(self.weights.keys() - self.benign.keys()):
            hint = nearest(unknown[0], self.benign)
            raise ValueError(f"weights names {unknown[0]!r}{hint}; the streams in benign are: {', '.join(self.benign)}")
        if lacking := [name for name in self.benign if name not in self.weights]:
            raise ValueError(f"weights lacks {', '.join(lacking)}: give each stream in benign a weight (0: left out)")
        if not sum(self.weights.values()):
            raise ValueError("weights are all 0: at least one stream must give samples")
        return self

    @model_validator(mode="after")
    def _is_not_empty(self) -> DataSettings:
        if self.num_harmful + self.num_benign == 0:
            raise ValueError("the mixture is empty: num_harmful + num_benign must be at least 1")
        return self


class AnyConfig(Settings):
    """What `train.py` and `evaluate.py` share: a model and how to evaluate it."""

    seed: Seed
    model: StartingModelSettings
    behavior: Plugin[Behavior]
    judge: Plugin[Judge] | None
    """None: the behavior's own."""
    data: DataSettings
    evaluation: EvaluationSettings
    generation: GenerationSettings
    trainer: TrainerSettings
    num_threads: Count | None
    """CPU threads of torch in each process; None: torch's own choice."""
    logger: LoggerSettings
    paths: PathSettings
    sweep: str | None
    """Folder of the multirun below paths.outputs; None: the run belongs to none, or the multirun names itself."""
    run_dir: str
    key: str
    """Of all settings that change results (`secvec.runs.keys`): runs with equal keys are the same run."""
    composed: str = Field("", exclude=True, repr=False)
    """The text of config.yaml in the run folder (`secvec.config.replay`); empty for a config made without Hydra."""


class SavedVector(Settings):
    """A trained vector, for a scan."""

    path: DirectoryPath | None
    """Its folder: `vector/` of a run, or any adapter that PEFT saved."""

    @property
    def behavior(self) -> None:
        """None is trained here."""


class ScanSettings(Settings):
    """How the rows of a file are scored and flagged (`secvec.evaluation.scan`)."""

    window: Annotated[int, Field(ge=1, le=6)]
    """Consecutive response tokens over which a gap is averaged; the highest is the row's score."""
    threshold: float | None
    """Nats per token above which a row is flagged; None: the `quantile` of scores of benign rows."""
    quantile: Annotated[float, Field(gt=0, lt=1)]
    """The share of benign rows that are not flagged."""
    benign_file: FilePath | None
    """Rows that are known to be benign; None: the KL rows of the vector, whose scores are kept beside it."""
    label: str | None
    """The column that says which rows are undesired, to measure the scan by; null in a row: not known. None: none."""
    undesired: list[bool | int | str]
    """The values of `label` that mean undesired; all others mean benign."""

    @model_validator(mode="after")
    def _has_one_threshold(self) -> ScanSettings:
        if self.threshold is not None and self.benign_file is not None:
            raise ValueError("threshold and benign_file both say what is high: give one of them")
        return self


class EvaluateConfig(AnyConfig):
    """One run of `evaluate.py`."""

    metrics: Literal["behavior", "lm_eval", "scan"]
    """`behavior`: our own evaluation; `lm_eval`: the `tasks` of lm-evaluation-harness; `scan`: the rows of a file."""
    vector: SavedVector
    scan: ScanSettings
    tasks: list[str]
    task_folder: DirectoryPath | None
    """A folder of your own yaml tasks; None: the tasks that the harness ships."""
    num_fewshot: int | None = Field(ge=0)
    limit: int | None = Field(ge=1)
    """Most samples of each task; None: all."""
    chat_template: bool
    """Whether lm_eval's prompts go through the model's chat template."""

    @model_validator(mode="after")
    def _tasks_belong_to_the_harness(self) -> EvaluateConfig:
        if (self.metrics == "lm_eval") != bool(self.tasks):
            raise ValueError("metrics=lm_eval and tasks=[...] belong together: give both or neither")
        return self

    @model_validator(mode="after")
    def _a_scan_has_rows_and_a_vector(self) -> EvaluateConfig:
        given = {"data.file": self.data.file, "vector.path": self.vector.path}
        if self.metrics == "scan" and (lacking := [name for name, path in given.items() if path is None]):
            raise ValueError(
                f"metrics=scan scores the rows of a file by a vector: set {' and '.join(lacking)} "
                "(data.file=FILE.jsonl vector.path=outputs/RUN/vector)"
            )
        if self.metrics != "scan" and (useless := [name for name, path in given.items() if path is not None]):
            raise ValueError(f"{' and '.join(useless)} of evaluate.py: only metrics=scan reads it")
        if self.metrics != "scan" and self.model.name_or_path is None and self.model.align is None:
            raise ValueError("model.name_or_path is required: the folder or hub id of the model to evaluate")
        return self


class RunConfig(AnyConfig):
    """One run of `train.py`."""

    stage: Literal["vector", "finetune", "infer", "all"]
    vector: VectorSettings
    defense: Plugin[Defense]
    tune: TuneSettings
    finetune: FinetuneSettings
    optimizer: OptimizerSettings
    scheduler: SchedulerSettings
    callbacks: dict[str, CallbackSettings]
    telemetry: TelemetrySettings
    force: bool
    """Run again although the run folder holds a finished run."""
    plan: bool | None
    """Check the run and print what it would cost, and run nothing. Null, not false, so that `+plan=true` works too."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages to run, in order. A run without a vector has no vector stage."""
        if self.stage != "all":
            return (self.stage,)
        return ("vector", "finetune", "infer") if self._trains_vector else ("finetune", "infer")

    @property
    def vector_behavior(self) -> Behavior:
        """The behavior that the vector is trained on."""
        return self.vector.behavior or self.behavior

    @property
    def labelled(self) -> bool:
        """Whether the defense is told which samples are undesired."""
        return self.defense.needs_labels if self.data.labelled is None else self.data.labelled

    @property
    def refits(self) -> bool:
        """Whether a new vector is trained before each cycle after the first."""
        return self.defense.refits_vector and self.finetune.cycles > 1

    @property
    def _trains_vector(self) -> bool:
        return self.defense.uses_vector and self.vector.path is None

    @model_validator(mode="after")
    def _is_possible(self) -> RunConfig:
        faults = []
        if self.stage == "vector" and not self.defense.uses_vector:
            faults.append(
                f"stage=vector trains nothing under defense={self.defense.name}: choose a defense with a vector"
            )
        if self.stage == "vector" and self.vector.path is not None:
            faults.append("stage=vector trains a vector but vector.path names a finished one: drop one of the two")
        if "vector" in self.stages and self.vector.kl_weight > 0 and not (self.vector.num_kl and self.data.benign):
            faults.append(
                "vector.kl_weight > 0 needs KL data: set vector.num_kl and data.benign, or vector.kl_weight=0"
            )
        if self.defense.refits_vector and not self._trains_vector:
            faults.append(f"defense={self.defense.name} trains its vectors: drop vector.path")
        if self.data.counts[1] > 0 and not self.data.benign:
            faults.append("data.num_benign > 0 needs at least one stream in data.benign")
        if self.defense.needs_labels and not self.labelled:
            faults.append(f"defense={self.defense.name} must know which samples are undesired: drop data.labelled")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _optimizer_and_schedule_can_be_built(self) -> RunConfig:
        check_optimization(self.optimizer, self.scheduler)
        return self
