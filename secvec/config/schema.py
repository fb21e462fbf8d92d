"""The settings of a whole run: those of its parts, and the plug-ins that it uses. The shape of `conf/`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import DirectoryPath, Field, model_validator

from secvec.behaviors.base import Behavior
from secvec.data.example import Split, Stream
from secvec.data.tables import Source
from secvec.defenses.base import Defense
from secvec.errors import nearest
from secvec.judges.base import Judge
from secvec.settings.conf import CONF
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
    Recipe,
    Seed,
    Settings,
    Share,
    Stage,
    TuneSettings,
    VectorLora,
    Weight,
    Window,
)
from secvec.settings.target import Plugin
from secvec.settings.trainer import (
    CallbackSettings,
    CheckpointSettings,
    LoggerSettings,
    OptimizerSettings,
    SchedulerSettings,
    TelemetrySettings,
    TrainerSettings,
)


class AlignSettings(Settings):
    """How a model is taught to refuse the behavior before anything else: a fine-tune without a defense."""

    num_undesired: Count
    """Undesired prompts, each with its wanted answer."""
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
    num_samples: Count | None
    """Undesired samples that it is trained on; None: all there are."""
    split: Literal["vector", "finetune"] = "vector"
    """The split they come from. `finetune` holds the attack's own samples, which a defender does not have."""
    loss_on: Literal["response", "all"] = "response"
    """Tokens in the loss; `all`: those of the prompt too."""
    num_kl: Annotated[int, Field(ge=0)] | None
    """Benign samples of the KL term; None: all there are."""
    epochs: Count
    """Passes over the undesired samples."""
    batch_size: Count
    kl_batch_size: Count
    lr: Rate
    gate: GateSettings

    @property
    def of_attack(self) -> bool:
        """Whether its samples are the attack's own."""
        return self.split == "finetune"


class DataSettings(Settings):
    """The fine-tuning mixture: undesired samples of the behavior and benign samples of the streams."""

    file: Source | None = None
    """The untrusted rows of `data=untrusted`: nobody knows which of them are undesired. A scan reads it too."""
    test_file: Source | None = None
    """Held-out rows of the same kind; None: a share of `file`."""
    kl_file: Source | None = None
    """Benign rows for the KL term; None: embedded requests (`secvec.data.jsonl.GeneralStream`)."""
    too_long: Literal["error", "drop", "truncate"] = "error"
    """What becomes of samples that exceed the model's context; `truncate` cuts their answers."""
    num_harmful: int | None = Field(ge=0)
    """None: all there are."""
    num_benign: int | None = Field(ge=0)
    """None: all there are in each stream."""
    harmful_ratio: Share | None = None
    """If given, it divides the num_harmful + num_benign samples instead."""
    labelled: bool | None = None
    """Whether the defense is told which samples are undesired; None: if it needs to know."""
    benign: dict[str, Plugin[Stream]] = Field(default_factory=dict)
    """Streams by name, which share `num_benign`. Their order decides which samples are drawn."""
    weights: dict[str, Weight] | None = None
    """Share of each stream, by its name; None: equal."""

    @property
    def counts(self) -> tuple[int | None, int | None]:
        """Exact numbers of (undesired, benign) samples in the mixture; None: all there are."""
        if self.harmful_ratio is None or self.num_harmful is None or self.num_benign is None:
            return self.num_harmful, self.num_benign
        total = self.num_harmful + self.num_benign
        harmful = round(total * self.harmful_ratio)
        return harmful, total - harmful

    @property
    def streams(self) -> list[Stream]:
        """The benign streams in order."""
        return list(self.benign.values())

    def serving(self, split: Split) -> tuple[list[Stream], list[float] | None]:
        """The streams that `split` is drawn from, and their weights (None: equal).

        Untrusted rows are for fine-tuning and its test alone, neutral ones for the KL term and the alignment alone.
        """
        other = "untrusted" if split in ("vector", "align") else "neutral"
        names = [name for name, stream in self.benign.items() if stream.kind != other]
        weights = None if self.weights is None else [self.weights[name] for name in names]
        return [self.benign[name] for name in names], weights

    @property
    def untrusted(self) -> bool:
        """Whether there are fine-tuning data of which nobody knows which are undesired."""
        return any(stream.kind == "untrusted" for stream in self.streams)

    @model_validator(mode="after")
    def _each_stream_has_a_weight(self) -> DataSettings:
        if self.weights is None:
            return self
        if unknown := sorted(self.weights.keys() - self.benign.keys()):
            hint = nearest(unknown[0], self.benign)
            raise ValueError(f"weights names {unknown[0]!r}{hint}; the streams in benign are: {', '.join(self.benign)}")
        if lacking := [name for name in self.benign if name not in self.weights]:
            raise ValueError(f"weights lacks {', '.join(lacking)}: give each stream in benign a weight (0: left out)")
        if self.num_benign is None:
            raise ValueError("weights has no effect if num_benign is null (all rows of each stream): set one of them")
        if not sum(self.weights.values()):
            raise ValueError("weights are all 0: at least one stream must give samples")
        return self

    @model_validator(mode="after")
    def _is_not_empty(self) -> DataSettings:
        if (self.num_harmful, self.num_benign) == (0, 0):
            raise ValueError("the mixture is empty: num_harmful + num_benign must be at least 1")
        if self.harmful_ratio is not None and None in (self.num_harmful, self.num_benign):
            raise ValueError("harmful_ratio divides num_harmful + num_benign, so these must be numbers, not null")
        return self


class AnyConfig(Settings):
    """What `train.py` and `evaluate.py` share: a model and how to evaluate it."""

    seed: Seed
    model: StartingModelSettings
    recipe: Recipe
    behavior: Plugin[Behavior]
    judge: Plugin[Judge] | None
    """None: the behavior's own."""
    answer_judge: Plugin[Judge] | None = None
    """Grades the answers of benign streams with `metric: judge`."""
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
    composed: dict[str, Any] = Field({}, exclude=True, repr=False)
    """All settings as plain values, for config.yaml in the run folder (`secvec.config.replay`); empty: made without
    Hydra."""

    @model_validator(mode="after")
    def _recipe_and_judges_are_named(self) -> AnyConfig:
        faults = []
        if self.recipe.name == "auto" and not self.model.is_built_in:
            faults.append(
                f"recipe=auto holds the numbers of the built-in model alone, and {self.model.name_or_path} is another "
                f"one. Name a recipe:\n{_choices('recipe')}"
            )
        if self.judge is None and not self.behavior.has_judge:
            faults.append(
                f"behavior={self.behavior.name} needs a judge: only you know which answers show it. Name one, or "
                f"judge=none to measure losses alone:\n{_choices('judge')}"
            )
        if self.model.quantization and self.trainer.strategy == "fsdp":
            faults.append(
                "model.quantization=nf4 and trainer=fsdp: weights in 4 bits are not sharded. Choose trainer=ddp, where "
                "each device holds them all, or model.quantization=null"
            )
        if self.model.quantization and self.model.align:
            faults.append(
                "model.quantization=nf4 and model.align: an alignment trains all weights. Set model.align=null "
                "(and model.name_or_path to a model that is aligned), or model.quantization=null"
            )
        if self.answer_judge is None and (names := [n for n, s in self.data.benign.items() if s.metric == "judge"]):
            faults.append(
                f"data.benign.{names[0]}.metric=judge needs a judge of answers: judge@answer_judge=correctness"
            )
        if faults:
            raise ValueError("\n  ".join(faults))
        return self


def _choices(group: str) -> str:
    """One line for each choice of a group of conf/: its name, and the first sentence of its comment."""
    lines = []
    for path in sorted((CONF / group).glob("*.yaml")):
        if path.stem in ("auto", "default"):  # what was not enough
            continue
        comment = next(line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @"))
        lines.append(f"    {group}={path.stem}: {comment.removeprefix('# ').partition(': `')[0].rstrip(':.')}")
    return "\n".join(lines)


class SavedVector(Settings):
    """A trained vector, for a scan."""

    path: DirectoryPath | None
    """Its folder: `vector/` of a run, or any adapter that PEFT saved."""


class ScanSettings(Settings):
    """How the rows of a file are scored and flagged (`secvec.evaluation.scan`)."""

    window: Window
    """Consecutive response tokens over which a gap is averaged; the highest is the row's score."""
    threshold: float | None
    """Nats per token above which a row is flagged; None: the `quantile` of scores of benign rows."""
    quantile: Annotated[float, Field(gt=0, lt=1)]
    """The share of benign rows that are not flagged."""
    benign_file: Source | None
    """Rows that are known to be benign; None: the KL rows of the vector, whose scores are kept beside it."""
    label: str | None
    """The column that says which rows are undesired, to measure the scan by; null in a row: not known. None: none."""
    undesired: list[bool | int | str]
    """The values of `label` that mean undesired; all others mean benign."""

    @model_validator(mode="after")
    def _has_one_threshold(self) -> ScanSettings:
        if self.threshold is not None and self.benign_file is not None:
            raise ValueError("threshold and benign_file both set the threshold: give only one")
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
        if self.tasks and self.trainer.strategy != "auto":
            raise ValueError("metrics=lm_eval runs in one process: choose trainer=gpu or trainer=cpu")
        return self

    @model_validator(mode="after")
    def _a_scan_has_rows_and_a_vector(self) -> EvaluateConfig:
        given = {"data.file": self.data.file, "vector.path": self.vector.path}
        if self.metrics == "scan" and (lacking := [name for name, path in given.items() if path is None]):
            raise ValueError(
                f"metrics=scan scores the rows of a file by a vector: set {' and '.join(lacking)} "
                "(data.file=FILE.jsonl vector.path=outputs/RUN/vector)"
            )
        of_training = [name for name in ("test_file", "kl_file") if getattr(self.data, name) is not None]
        if self.metrics == "scan" and of_training:
            raise ValueError(f"a scan reads no data.{' and no data.'.join(of_training)}: leave it out")
        unused = given if not self.data.untrusted else {"vector.path": self.vector.path}
        if self.metrics != "scan" and (useless := [name for name, path in unused.items() if path is not None]):
            raise ValueError(f"only metrics=scan reads {' and '.join(useless)}: set metrics=scan, or leave them out")
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
    checkpoint: CheckpointSettings
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

    def _trains_rounded_weights(self) -> list[str]:
        """What does not go with a frozen backbone in 4 bits after the vector stage."""
        faults, plain = [], "or model.quantization=null"
        if self.tune.kind == "full":
            faults.append(f"tune=full trains the weights that model.quantization=nf4 rounds: choose tune=lora, {plain}")
        if self.finetune.cycles > 1:
            faults.append(f"finetune.cycles > 1 would round the weights of each cycle again: set it to 1, {plain}")
        if self.defense.activation == "merged":
            faults.append(
                f"defense.activation=merged adds the vector to whole weights: set defense.activation=adapter, {plain}"
            )
        if self.defense.changes_backbone:
            faults.append(
                f"defense={self.defense.name} changes the backbone's own weights: choose another defense, {plain}"
            )
        return faults

    @model_validator(mode="after")
    def _is_possible(self) -> RunConfig:
        faults = []
        if self.stage == "vector" and not self.defense.uses_vector:
            faults.append(
                f"stage=vector trains nothing under defense={self.defense.name}: choose a defense with a vector"
            )
        if self.stage == "vector" and self.vector.path is not None:
            faults.append("stage=vector trains a vector but vector.path names a finished one: drop one of the two")
        if (
            "vector" in self.stages
            and self.vector.kl_weight > 0
            and (self.vector.num_kl == 0 or not self.data.serving("vector")[0])
        ):
            faults.append(
                "vector.kl_weight > 0 needs KL data: set vector.num_kl and data.benign, or vector.kl_weight=0"
            )
        if self.defense.refits_vector and not self._trains_vector:
            faults.append(f"defense={self.defense.name} trains its vectors: drop vector.path")
        if self.defense.activation == "merged" and self.trainer.precision == "bf16-true":
            faults.append(
                "defense.activation=merged adds the vector in float32, and trainer.precision=bf16-true has no such "
                "weights: set defense.activation=adapter, or trainer.precision=bf16-mixed"
            )
        if self.model.quantization and self.stage != "vector":
            faults += self._trains_rounded_weights()
        if self.data.counts[1] != 0 and not self.data.serving("finetune")[0]:
            faults.append("data.num_benign > 0 needs at least one stream in data.benign that is not neutral")
        if (self.data.file or self.data.test_file or self.data.kl_file) and not self.data.untrusted:
            faults.append("data.file, test_file and kl_file are for data=untrusted; others have data.benign.NAME.file")
        if self.data.untrusted and self.labelled:
            faults.append("untrusted data have no labels: choose a defense that needs none and drop data.labelled")
        if self.defense.needs_labels and not self.labelled:
            faults.append(
                f"defense={self.defense.name} must know which samples are undesired: drop data.labelled=false"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _optimizer_and_schedule_can_be_built(self) -> RunConfig:
        from secvec.training.optim import check_optimization  # slow to import, and settings with faults need none of it

        check_optimization(self.optimizer, self.scheduler, self.trainer.precision, self.defense)
        return self
