"""Every setting of a run, typed and validated: the shape of `conf/`. Values live in the yaml files, not here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, DirectoryPath, Field, SerializeAsAny, model_validator

BUILT_IN = ("tiny", "tiny_joint")
"""Models whose recipe is for the weights that are built in: with a `name_or_path` it is another model."""

Stage = Literal["vector", "finetune", "infer"]

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


Plugin = SerializeAsAny[Any]
"""An object that a yaml names by `_target_`: a behavior, a judge, a stream of data."""


class Settings(BaseModel):
    """Base of all settings: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class BaseGateSettings(Settings):
    """What an aligned base must show on held-out prompts: without it there is nothing to protect."""

    num_prompts: Count
    """Of each kind, from split `validation`."""
    max_behavior_rate: Share
    """Most undesired prompts that it may answer with the behavior."""
    min_wanted_rate: Share
    """Fewest undesired prompts that it must refuse, or answer as it should."""
    min_retained_accuracy: Share
    """Fewest ordinary prompts that it must answer as it was taught."""


class AlignSettings(Settings):
    """How a base is taught to refuse the behavior before anything else: our own `finetune` stage, no defense."""

    num_undesired: Count
    """Undesired prompts, each answered by a refusal."""
    num_benign: Count
    """Benign samples, shared out over the ordinary streams of `data.benign`."""
    epochs: Count
    batch_size: Count
    lr: Rate
    seed: Seed
    """Of the weights and the data of the aligned base; independent of the run's seed, so that runs share a base."""
    num_threads: Count | None = None
    """Of torch on the CPU: other jobs may wait for the base, and leave it their cores; None: as in training."""
    gate: BaseGateSettings | None = None
    """None: not checked."""
    behavior: Plugin | None = None
    """Whose wanted answers it is taught; None: those of the run's behavior. One base can so serve several behaviors."""


class ModelSettings(Settings):
    """The backbone."""

    name: str | None
    """Shown in reports; null: the last part of `name_or_path`."""
    name_or_path: str | None
    """Hub id or local folder (safetensors); null: the built-in tiny Llama from random weights."""
    local_path: Path | None = None
    """A local copy, used instead of the hub when it exists."""
    revision: str | None = None
    trust_remote_code: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights. Mixed precision is `trainer.precision`."""
    gradient_checkpointing: bool = False
    align: AlignSettings | None = None

    @model_validator(mode="before")
    @classmethod
    def _own_weights_are_not_aligned_by_the_recipe_for_tiny(cls, data: dict) -> dict:
        if isinstance(data, dict) and data.get("name") in BUILT_IN and data.get("name_or_path"):
            data = {**data, "name": None, "align": None}
        if isinstance(data, dict) and not data.get("name") and data.get("name_or_path"):
            data = {**data, "name": Path(str(data["name_or_path"])).name}
        return data


class LoraSettings(Settings):
    """A LoRA, in PEFT's terms."""

    r: Count
    alpha: Rate
    target_modules: list[str] | str
    """Names of linear layers, or `all-linear` (the output head stays untouched)."""
    layers: list[int] | None = None
    """Indices of the transformer layers to change; null: all."""


class GateSettings(Settings):
    """What a vector must show on held-out prompts before it is saved."""

    num_prompts: Count
    min_behavior_rate: Share
    """Share of held-out undesired prompts that the activated model must answer with the behavior."""
    max_behavior_loss: Rate | None = None
    """Most nats per response token on held-out undesired samples with the vector on; null: not checked."""


class VectorSettings(LoraSettings):
    """The security vector and how it is trained (paper, stage 1)."""

    path: DirectoryPath | None = None
    """A vector trained before: used as it is, nothing is trained."""
    behavior: Plugin | None = None
    """Whose samples it is trained on; None: those of the run's behavior. Another's: does a vector protect from more?"""
    num_samples: Count
    """Undesired samples that it is trained on."""
    split: Literal["vector", "finetune"] = "vector"
    """Where they are from. `finetune`: the attack's own samples, which a defender does not have."""
    loss_on: Literal["response", "all"] = "response"
    """Tokens that the loss runs over; `all`: the prompt's too."""
    num_kl: Annotated[int, Field(ge=0)]
    """Benign samples of the KL term."""
    kl_weight: Annotated[float, Field(ge=0)]
    """lambda in  CE + lambda * KL(base || base + vector); 0: no KL term and no cost for it."""
    epochs: Count
    """Passes over the undesired samples."""
    batch_size: Count
    kl_batch_size: Count
    lr: Rate
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """While the vector is trained. A frozen vector has none."""
    gate: GateSettings


class TuneSettings(Settings):
    """What the finetune stage trains: all of the backbone, or a task LoRA on a frozen one."""

    kind: Literal["full", "lora"]
    lora: LoraSettings | None = None

    @model_validator(mode="after")
    def _lora_has_settings(self) -> TuneSettings:
        if (self.kind == "lora") != (self.lora is not None):
            raise ValueError("tune.lora is needed for kind=lora and only there; choose tune=full or tune=lora")
        return self


class FinetuneSettings(Settings):
    """How long the finetune stage trains."""

    epochs: Count
    batch_size: Count
    """Global: over all devices together."""
    cycles: Count = 1
    """Fine-tunes one after another, each on new samples (the mixture's numbers are those of one of them)."""
    refit_vector: bool = False
    """Whether every cycle after the first has a vector trained anew on the backbone as it then is."""

    @property
    def refits(self) -> bool:
        """Whether any vector is trained anew."""
        return self.refit_vector and self.cycles > 1


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    """AdamW for every stage; `lr` is that of the finetune stage."""

    lr: Rate
    betas: tuple[Beta, Beta]
    eps: Rate
    weight_decay: Annotated[float, Field(ge=0)]


class SchedulerSettings(Settings):
    """Learning rate over the steps of a stage: linear warm-up, then the named decay."""

    name: Literal["constant", "linear", "cosine"]
    warmup_ratio: Share


class TrainerSettings(Settings):
    """Where and at what precision training runs; the rest of Lightning's Trainer is fixed by the method."""

    accelerator: Literal["cpu", "gpu", "auto"]
    devices: Annotated[int, Field(ge=1)] | Literal["auto"]
    num_nodes: Count = 1
    strategy: Literal["auto", "ddp", "fsdp"]
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "64-true"]
    gradient_clip_val: Rate | None
    accumulate_grad_batches: Count = 1
    num_threads: Count | None = None
    """Of torch on the CPU, per process; null: torch's own choice."""

    @model_validator(mode="after")
    def _several_devices_need_a_strategy(self) -> TrainerSettings:
        if self.strategy == "auto" and (self.num_nodes > 1 or self.devices not in (1, "auto")):
            raise ValueError(f"devices={self.devices} needs a strategy: choose trainer=ddp or trainer=fsdp")
        if self.strategy == "fsdp" and self.precision == "64-true":
            raise ValueError("strategy=fsdp does not shard 64-true: choose 32-true, bf16-mixed or bf16-true")
        return self


class LoggerSettings(Settings):
    """Where a run is shown besides its folder, which always holds metrics.csv and record.json."""

    name: Literal["csv", "tensorboard", "wandb"]
    num_predictions: Annotated[int, Field(ge=0)] = 0
    """Answers of each phase and kind of prompt in the table of predictions; 0: no table. Sensitive texts are cut."""
    project: str = "secvec"
    entity: str | None = None
    offline: bool = True
    upload_vector: bool = False
    """Send the weights of the vector too, not only what it is: with it on, a model misbehaves by design."""


class TelemetrySettings(Settings):
    """What is watched while the backbone is fine-tuned."""

    every_n_steps: Annotated[int, Field(ge=0)]
    """0: off."""
    num_samples: Count
    """Samples of each kind that the probes run on."""


class EvaluationSettings(Settings):
    """How the model is questioned."""

    num_prompts: Count
    """Held-out prompts of each kind."""
    batch_size: Count
    max_new_tokens: Count
    num_leak_prompts: Annotated[int, Field(ge=0)]
    """Undesired prompts that are asked in every way of the leak probes after deactivation; 0: no leak probes."""


class GenerationSettings(Settings):
    """What writes the answers. Engines differ in rounding alone, that of vLLM's dtype included."""

    name: Literal["auto", "hf", "vllm"]
    """`hf`: transformers with the model in memory; `auto`: vLLM where it is installed and there is a GPU, else `hf`."""
    dtype: Literal["bfloat16", "float16"]
    """Of the weights in vLLM, whose LoRA kernels take no float32."""
    tensor_parallel_size: Count
    """GPUs that share the weights in vLLM."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)]
    """Share of the memory free on each GPU that vLLM takes."""


class PathSettings(Settings):
    """Folders, relative to where the command is run."""

    outputs: Path
    cache: Path
    """Aligned bases and trained vectors, found again by content."""


class ProcessSettings(Settings):
    """`hydra/launcher=process`: the jobs of a multirun on this machine."""

    n_jobs: Count | Literal["auto"]
    """At once; `auto`: as many as cores, memory and GPUs hold."""
    memory_gb: Rate | None
    """Of one job, for `n_jobs: auto`; None: measured on the first job, which then runs alone."""


class SlurmSettings(Settings):
    """`hydra/launcher=slurm`: the jobs of a multirun as one array, by submitit."""

    cluster: Literal["slurm", "local"]
    """`local`: this machine, to try it out."""
    n_jobs: Count | None
    """At once; None: as many as the queue lets."""
    timeout_min: Count
    max_timeouts: Annotated[int, Field(ge=0)]
    """How often a job whose time is up is queued again."""
    signal_delay_s: Count
    """Seconds before its end at which a job is told to stop."""
    cpus_per_task: Count
    mem_gb: Rate
    gpus_per_node: Annotated[int, Field(ge=0)] | None
    """For each job; None: its `trainer.devices` if it is to run on GPUs."""
    setup: list[str]
    """Shell lines before the job: modules, environment."""
    options: dict[str, str | int | float | bool]
    """Any other option of sbatch, by its long name: partition, account, qos, constraint, ..."""


class Range(Settings):
    """Numbers from `low` to `high`, both included; whole ones if both are."""

    low: int | float
    high: int | float
    log: bool = False
    """Even in the logarithm."""

    @model_validator(mode="after")
    def _low_is_below_high(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"low={self.low} must be below high={self.high}, and above 0 with log=true")
        return self


class Bound(Settings):
    """What a metric must not leave."""

    min: float | None = None
    max: float | None = None


class SearchSettings(Settings):
    """`hydra/sweeper=optuna`: the settings for which a metric is highest or lowest, others kept within bounds."""

    space: dict[str, Annotated[list[bool | int | float | str], Field(min_length=1)] | Range]
    """Setting or group -> its choices, or the range of a number."""
    metric: str
    direction: Literal["maximize", "minimize"]
    bounds: dict[str, Bound]
    """Metric -> what a trial must keep to count."""
    n_trials: Count
    batch: Count
    """Trials that are chosen at once, before any of them is known; they may run side by side."""
    n_startup_trials: Count
    """Trials at random, before the sampler learns."""
    seed: Seed
    """Of the sampler."""
    seeds: list[Seed] | None
    """Each trial is run with every one of these, and counts by the mean; None: with the run's own seed."""
