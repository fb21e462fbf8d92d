"""The settings of each part of a run, typed and validated.

A run takes its values from `conf/`; the defaults here are for use from Python.

`secvec/config/schema.py` composes them, with the plug-ins, into the settings of a whole run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

BUILT_IN = ("tiny", "tiny_joint")
"""Models whose recipe is for the weights that are built in: with a `name_or_path` it is another model."""

Stage = Literal["vector", "finetune", "infer"]

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]
WINDOWS = range(1, 7)
"""Lengths of the window of a scan, in tokens."""
Window = Annotated[int, Field(ge=WINDOWS[0], le=WINDOWS[-1])]
"""Tokens over which the scan of a row takes its highest gap; scores are kept for each of them."""
Weight = Annotated[float, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Settings(BaseModel):
    """Base of all settings: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


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
    quantization: Literal["nf4"] | None = None
    """The linear layers in 4 bits (bitsandbytes, arXiv 2305.14314); all else, and what is multiplied, has `dtype`.
    The backbone is frozen: for `stage=vector` and `tune=lora`. What is saved has plain weights."""
    gradient_checkpointing: bool = False
    packing: bool = True
    """Rows of a training batch in one sequence without padding, each attending to itself, where the model can."""
    compile: Literal["inductor", "aot_eager", "eager"] | None = None
    """torch.compile of each transformer layer while it is trained, by this backend (two are for finding faults)."""

    @property
    def is_built_in(self) -> bool:
        """Whether it is the built-in tiny model, or was trained from it."""
        if self.name_or_path is None:
            return True
        try:
            config = json.loads((Path(self.name_or_path) / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(config, dict) and config.get("secvec_recipe") == "tiny"

    @model_validator(mode="before")
    @classmethod
    def _is_named_after_its_path(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("name") and data.get("name_or_path"):
            data = {**data, "name": Path(str(data["name_or_path"])).name}
        return data


class LoraSettings(Settings):
    """A LoRA, in PEFT's terms."""

    r: Count
    alpha: Rate
    target_modules: list[str] | str | None = None
    """Names of linear layers, or `all-linear` (the output head stays untouched).

    None: `q_proj` and `v_proj`; all linear layers where the model does not have both, such as GPT-2 and Phi-3.
    """
    layers: list[int] | None = None
    """Indices of the transformer layers to change; null: all."""


class GateSettings(Settings):
    """What a vector must show on held-out prompts before it is saved."""

    num_prompts: Count | None
    """None: all of split `validation`."""
    min_behavior_rate: Share
    """Share of held-out prompts that the activated model must answer with the behavior; not for judge=none."""
    min_loss_drop: Weight | None = 0.1
    """Least nats per token by which the vector lowers the loss on held-out undesired samples; null: not checked."""
    max_behavior_loss: Rate | None = None
    """Most nats per response token on held-out undesired samples with the vector on; null: not checked."""


class VectorLora(LoraSettings):
    """The LoRA of a security vector and its loss: all that `SecVecModule` must know to train one."""

    kl_weight: Annotated[float, Field(ge=0)] = 1.0
    """lambda in  CE + lambda * KL(base || base + vector); 0: the KL term is not computed."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """LoRA dropout while the vector is trained."""
    keep_dropout: bool = False
    """Whether the frozen vector keeps this dropout during fine-tuning, as in arXiv 2405.14577; the method has none."""


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
    """Rows of a batch, over all devices together; an optimizer step has `trainer.accumulate_grad_batches` of them."""
    cycles: Count = 1
    """Fine-tunes one after another, each on new samples: `data.num_harmful` and `data.num_benign` count one cycle."""


class ValidationSettings(Settings):
    """What is measured while a stage trains: losses at the end of each epoch, answers every n steps."""

    num_samples: Annotated[int, Field(ge=0)] | None
    """Most held-out samples of each kind for the validation losses; None: all; 0: no validation loop."""
    num_prompts: Count | None
    """Most held-out prompts of each kind that are answered during the finetune stage, the vector off; None: all."""
    every_n_steps: Annotated[int, Field(ge=0)]
    """Optimizer steps between two such evaluations; 0: none."""


class EvaluationSettings(Settings):
    """How a model is evaluated."""

    num_prompts: Count | None
    """Held-out prompts of each kind; None: all."""
    batch_size: Count
    max_new_tokens: Count
    num_leak_prompts: Annotated[int, Field(ge=0)] | None
    """Most undesired prompts that the leak probes put in every way; None: all; 0: no leak probes."""
    split: Literal["test", "validation"] = "test"
    """Of the held-out prompts. `validation`: to choose settings by; only results on `test` are results."""
    validation: ValidationSettings = ValidationSettings(num_samples=32, num_prompts=8, every_n_steps=0)
    """While a stage trains."""


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


class VectorRecipe(Settings):
    """How a vector is trained."""

    lr: Rate
    epochs: Count
    batch_size: Count
    kl_batch_size: Count
    target_modules: list[str] | str | None = None


class EvaluationRecipe(Settings):
    """How answers are generated."""

    batch_size: Count
    max_new_tokens: Count


class Recipe(Settings):
    """The numbers that suit a size of model. The settings of the stages take them over, unless they are given."""

    name: str
    lr: dict[Literal["full", "lora"], Rate]
    """Of the finetune stage with AdamW."""
    epochs: Count
    batch_size: Count
    vector: VectorRecipe
    evaluation: EvaluationRecipe


class PathSettings(Settings):
    """Folders, relative to where the command is run."""

    outputs: Path
    cache: Path
    """What runs share, found by content: aligned models, vectors, answers, tokens and more."""
