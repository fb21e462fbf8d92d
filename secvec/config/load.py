"""The one boundary between Hydra's yaml and the program: composed config in, typed run out, or every fault at once."""

from __future__ import annotations

import importlib
import typing
from typing import Any, Literal, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, DirectoryPath, Field, SerializeAsAny, ValidationError, model_validator

from secvec.defenses.base import Defense
from secvec.errors import ConfigError
from secvec.runs.keys import NOT_IN_KEY, run_key
from secvec.settings.messages import describe
from secvec.settings.schema import (
    EvaluationSettings,
    FinetuneSettings,
    GenerationSettings,
    LoggerSettings,
    ModelSettings,
    OptimizerSettings,
    PathSettings,
    Plugin,
    SchedulerSettings,
    Seed,
    Settings,
    Share,
    Stage,
    TelemetrySettings,
    TrainerSettings,
    TuneSettings,
    VectorSettings,
    Weight,
)

Config = TypeVar("Config", bound=BaseModel)


class DataSettings(Settings):
    """The fine-tuning mixture: undesired samples of the behavior and benign samples of the streams."""

    num_harmful: int = Field(ge=0)
    num_benign: int = Field(ge=0)
    harmful_ratio: Share | None
    """When given, the num_harmful + num_benign samples are divided by it instead."""
    labelled: bool = False
    """Whether defenses are told which samples are undesired. Hidden: what they do, they do to all."""
    benign: list[Plugin]
    """Streams that share out `num_benign`."""
    weights: list[Weight] | None = None
    """Of the streams, in their order; None: equal."""

    @property
    def counts(self) -> tuple[int, int]:
        """Exact numbers of (undesired, benign) samples in the mixture."""
        total = self.num_harmful + self.num_benign
        if self.harmful_ratio is None:
            return self.num_harmful, self.num_benign
        harmful = round(total * self.harmful_ratio)
        return harmful, total - harmful

    @model_validator(mode="after")
    def _one_weight_a_stream(self) -> DataSettings:
        if self.weights is not None and len(self.weights) != len(self.benign):
            raise ValueError(f"weights has {len(self.weights)} entries for {len(self.benign)} streams in benign")
        if self.weights is not None and sum(self.weights) == 0:
            raise ValueError("weights are all 0: at least one stream must give samples")
        return self

    @model_validator(mode="after")
    def _not_empty(self) -> DataSettings:
        if self.num_harmful + self.num_benign == 0:
            raise ValueError("the mixture is empty: num_harmful + num_benign must be at least 1")
        return self


class AnyConfig(Settings):
    """What `train.py` and `evaluate.py` share: a backbone and what to ask it."""

    seed: Seed
    model: ModelSettings
    behavior: Plugin
    judge: Plugin | None
    """None: the behavior's own."""
    data: DataSettings
    evaluation: EvaluationSettings
    generation: GenerationSettings
    trainer: TrainerSettings
    paths: PathSettings
    run_dir: str
    content: str
    """Key of the settings as composed: a multirun knows its finished runs by it, without loading them."""

    def key(self) -> str:
        """Content hash of all that shapes the results: equal keys, equal runs."""
        return run_key(self.model_dump(mode="json", exclude=NOT_IN_KEY))


class EvaluateConfig(AnyConfig):
    """One run of `evaluate.py`."""

    metrics: Literal["behavior", "lm_eval"]
    """`behavior`: our own questions; `lm_eval`: the `tasks` of lm-evaluation-harness."""
    tasks: list[str]
    task_folder: DirectoryPath | None
    """A folder with yaml tasks of one's own; None: those that the harness ships."""
    num_fewshot: int | None = Field(ge=0)
    limit: int | None = Field(ge=1)
    """Most samples of each task; None: all."""
    chat_template: bool
    """Whether lm_eval's prompts go through the model's chat template."""

    @model_validator(mode="after")
    def _tasks_for_the_harness(self) -> EvaluateConfig:
        if (self.metrics == "lm_eval") != bool(self.tasks):
            raise ValueError("metrics=lm_eval and tasks=[...] belong together: give both or neither")
        return self


class RunConfig(AnyConfig):
    """One run of `train.py`."""

    stage: Literal["vector", "finetune", "infer", "all"]
    vector: VectorSettings
    defense: SerializeAsAny[Defense]
    tune: TuneSettings
    finetune: FinetuneSettings
    optimizer: OptimizerSettings
    scheduler: SchedulerSettings
    logger: LoggerSettings
    telemetry: TelemetrySettings
    sweep: str
    force: bool
    """Run again although the run folder holds a finished run."""
    plan: bool | None
    """Check and print what the run would take, and run nothing. Null, not false, so that `+plan=true` is taken too."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages to run, in order. A run without a vector has no vector stage."""
        if self.stage != "all":
            return (self.stage,)
        trains_vector = self.defense.uses_vector and self.vector.path is None
        return ("vector", "finetune", "infer") if trains_vector else ("finetune", "infer")

    @property
    def vector_behavior(self) -> Plugin:
        """The behavior that the vector is trained on: its own, or that of the run."""
        return self.vector.behavior or self.behavior

    @model_validator(mode="after")
    def _possible(self) -> RunConfig:
        faults = []
        if self.stage == "vector" and not self.defense.uses_vector:
            faults.append(
                f"stage=vector trains nothing under defense={self.defense.name}: choose a defense with a vector"
            )
        if self.stage == "vector" and self.vector.path is not None:
            faults.append("stage=vector trains a vector but vector.path names a finished one: drop one of the two")
        if "vector" in self.stages and self.vector.kl_weight > 0 and (self.vector.num_kl == 0 or not self.data.benign):
            faults.append(
                "vector.kl_weight > 0 needs KL data: set vector.num_kl and data.benign, or vector.kl_weight=0"
            )
        if self.finetune.refit_vector and not (self.defense.uses_vector and self.vector.path is None):
            faults.append("finetune.refit_vector=true trains vectors: it needs a defense with one, and no vector.path")
        if self.data.counts[1] > 0 and not self.data.benign:
            faults.append("data.num_benign > 0 needs at least one stream in data.benign")
        if self.defense.needs_labels and not self.data.labelled:
            faults.append(f"defense={self.defense.name} must know which samples are undesired: set data.labelled=true")
        if faults:
            raise ValueError("; ".join(faults))
        return self


def load(cfg: DictConfig, schema: type[Config]) -> Config:
    """The typed config; raises ConfigError naming every fault, what is allowed and the nearest match."""
    try:
        raw = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration cannot be resolved: {error}") from None
    faults = [f"{where}: a value is required (it is ??? in conf/)" for where in OmegaConf.missing_keys(cfg)]
    resolved = _resolve_plugins(raw, faults, ())
    try:
        config = schema.model_validate(resolved)
    except ValidationError as error:
        faults += [describe(fault, schema) for fault in error.errors() if fault.get("input") != "???"]
    if faults:
        raise ConfigError("\n".join(["the configuration has these faults:", *(f"  {fault}" for fault in faults)]))
    return config


def _resolve_plugins(node: Any, faults: list[str], where: tuple[str, ...]) -> Any:
    """Replaces every mapping with a `_target_` by the object it describes; collects what is wrong in `faults`."""
    if isinstance(node, list):
        return [_resolve_plugins(item, faults, (*where, str(i))) for i, item in enumerate(node)]
    if not isinstance(node, dict):
        return node
    node = {key: _resolve_plugins(value, faults, (*where, str(key))) for key, value in node.items()}
    if "_target_" not in node:
        return node
    target = str(node.pop("_target_"))
    try:
        module, _, name = target.rpartition(".")
        plugin = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        faults.append(f"{'.'.join(where)}._target_: cannot import {target!r}: {error}")
        return _Invalid()
    if not (isinstance(plugin, type) and issubclass(plugin, BaseModel)):
        faults.append(f"{'.'.join(where)}._target_: {target} is no settings class (see docs/add-a-behavior.md)")
        return _Invalid()
    group = next((part for part in where if part in PLUGIN_NEEDS), "")
    if lacking := [name for name in PLUGIN_NEEDS.get(group, ()) if not _has(plugin, name)]:
        faults.append(f"{'.'.join(where)}._target_: {target} is no {group}: it lacks {', '.join(lacking)}")
        return _Invalid()
    try:
        return plugin.model_validate(node)
    except ValidationError as error:
        faults += [describe(fault, plugin, where) for fault in error.errors() if fault.get("input") != "???"]
        return _Invalid()


PLUGIN_NEEDS = {
    "behavior": ("name", "sensitive", "kind", "examples", "judge", "desired", "look_alikes", "eliciting_prompt"),
    "judge": ("name", "scale", "judge"),
    "data": ("kind", "examples"),
    "defense": ("name", "uses_vector", "attach", "loss"),
}
"""What the plug-ins of a group must have."""


def _has(plugin: type[BaseModel], name: str) -> bool:
    return name in plugin.model_fields or hasattr(plugin, name)


class _Invalid(Defense):
    """Stands in for a plug-in whose faults are already listed, so that the rest can be checked too."""

    name: str = "invalid"
    uses_vector: typing.ClassVar[bool] = True
