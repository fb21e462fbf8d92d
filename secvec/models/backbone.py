"""The backbone: where it is found, how it is loaded, frozen, counted and saved."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from secvec.errors import ArtifactError, ConfigError, nearest, one_line
from secvec.models.modes import in_eval
from secvec.models.outline import Weights, outlined, weights_at_hand
from secvec.models.packing import enable_packing, rounding
from secvec.models.quantized import keep_packing, shape_of
from secvec.models.vector import AdaptersOfForward, active_parts, check_adapter, part_of, vector_info
from secvec.runs.content import file_digest, folder_digest
from secvec.settings.schema import ModelSettings

log = logging.getLogger(__name__)

WEIGHT_FILES = "*.safetensors"
MAX_SHARD_SIZE = "5GB"
"""Of a file of weights, unless a single weight is larger."""
LOADING_ERRORS = (
    *(ValueError, OSError, SafetensorError, RuntimeError, KeyError, ImportError, AttributeError, TypeError),
    StrictDataclassError,  # of the checks of a config
)
"""What transformers, or the own code of a model, raises for a folder that it cannot load."""


@dataclass(frozen=True)
class Backbone:
    """A causal LM in a Hugging Face folder, and how it is loaded."""

    folder: Path
    settings: ModelSettings

    @classmethod
    def of(cls, given: Backbone | ModelSettings | Mapping[str, Any] | str | Path) -> Backbone:
        """From a folder, a hub id or settings. Raises ArtifactError when there is no such model.

        Raises ConfigError where `quantization` is asked for and this machine cannot.
        """
        if isinstance(given, Backbone):
            return given
        if isinstance(given, str | Path):
            given = {"name": None, "name_or_path": str(given)}
        settings = given if isinstance(given, ModelSettings) else ModelSettings.model_validate(given)
        if settings.quantization:
            _check_bitsandbytes()
        folder = locate(settings)
        load_config(folder, settings.trust_remote_code)
        return cls(folder, settings)

    def at(self, folder: Path) -> Backbone:
        """Another checkpoint of the same model, loaded in the same way, but never in 4 bits: it would be rounded again.

        Raises ArtifactError.
        """
        return Backbone(check(folder), self.settings.model_copy(update={"quantization": None}))

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the weights and the config."""
        return fingerprint(self.folder)

    @cached_property
    def identity(self) -> list[str | bool]:
        """What tells a loaded copy from all others: what its folder holds, and how it is loaded."""
        settings = self.settings
        how = [settings.dtype, settings.trust_remote_code, settings.packing]
        return [folder_digest(self.folder), *how, *filter(None, [settings.compile, settings.quantization])]

    @cached_property
    def tokenizer_digest(self) -> str:
        """16 hex digits of the chat template, and of the ids that a sample text gets."""
        tokenizer = self.tokenizer
        sample = tokenizer("The  crow's nest, 7 of 19:\n\tnaïve — 日本 🙂")["input_ids"]
        return hashlib.sha256(repr([tokenizer.chat_template, sample]).encode()).hexdigest()[:16]

    def check_vector(self, folder: Path) -> None:
        """Raises ArtifactError for a folder without a vector, and for a vector of another model or tokenizer."""
        check_adapter(folder)
        info = vector_info(folder)
        trained_on = info.get("backbone")
        if trained_on not in (None, self.fingerprint):
            raise ArtifactError(
                f"the vector in {folder} was trained on another model ({trained_on}) than {self.folder} "
                f"({self.fingerprint}) and does not work on it: give the model that it was trained on, or train a "
                "vector on this model (stage=vector)"
            )
        if (trained_with := info.get("tokenizer")) and trained_with != self.tokenizer_digest:
            raise ArtifactError(
                f"the vector in {folder} was trained with another chat template or tokenizer than {self.folder} has "
                "now. Use the chat template and tokenizer that it was trained with, or train a new vector "
                "(stage=vector)"
            )

    @property
    def num_bytes(self) -> int:
        """Size of the weights once they are loaded."""
        count = 0
        # some folders hold the weights a second time, under the names of another program
        for file in [*self.folder.glob("model*.safetensors")] or self.folder.glob(WEIGHT_FILES):
            with safe_open(file, framework="pt") as tensors:
                count += sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        return count * getattr(torch, self.settings.dtype).itemsize

    def load(self) -> PreTrainedModel:
        """A fresh copy, in eval mode."""
        return load_backbone(self.folder, self.settings)

    def outline(self) -> PreTrainedModel:
        """As `load`, for a process that will hold a shard: its weights stay on disk (`secvec.models.outline`)."""
        model = _from_pretrained(self.folder, self.settings, device_map="meta")
        if not outlined(model, self.folder):
            log.warning(
                "%s: its files hold the weights otherwise than the model does, so each process that reads it loads it "
                "whole: %.1f GB of main memory. Where only the names are old, saving it once by transformers helps",
                self.folder,
                self.num_bytes / 1e9,
            )
            return self.load()
        _check_tied(model, self.folder)
        _check_causal(model, self.folder)
        return prepared(model, self.settings)

    def check_weights(self) -> None:
        """Raises ArtifactError where the files do not hold all weights of a causal LM; only their names are read."""
        _from_pretrained(self.folder, self.settings, device_map="meta")

    def skeleton(self) -> PreTrainedModel:
        """The model without its weights."""
        config = load_config(self.folder, self.settings.trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=self.settings.trust_remote_code)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights; its `num_embeddings` says how many ids the model knows."""
        tokenizer: Any = load_tokenizer(self.folder, self.settings.trust_remote_code)
        tokenizer.num_embeddings = self.vocabulary
        return tokenizer  # type: ignore[no-any-return]

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the model knows; read from its config."""
        return int(self._config.vocab_size)

    @cached_property
    def context(self) -> int:
        """The most tokens that the model takes; read from its config, without the weights."""
        return context_of(self._config)

    @cached_property
    def _config(self) -> Any:
        return load_config(self.folder, self.settings.trust_remote_code).get_text_config()

    def hyperparameters(self) -> dict[str, Any]:
        """Plain values from which `of` makes it again."""
        fields = {"name", "revision", "trust_remote_code", "dtype", "quantization"}
        fields |= {"gradient_checkpointing", "packing", "compile"}
        return self.settings.model_dump(mode="json", include=fields) | {"name_or_path": str(self.folder)}


def context_of(config: Any) -> int:
    """The most tokens that a model of this Hugging Face config takes; a vision-language model, by its text part.

    With longrope it is the length before it was extended: beyond that the rotation depends on the longest row of a
    batch, so a row would have another loss beside a long one than alone.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return int(rope.get("original_max_position_embeddings") or config.original_max_position_embeddings)
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    return int(next((length for name in names if (length := getattr(config, name, None))), 2048))


def locate(settings: ModelSettings) -> Path:
    """The model's local folder, downloaded from the hub if necessary. Raises ArtifactError."""
    assert settings.name_or_path is not None
    if settings.local_path is not None and settings.local_path.is_dir():
        return check(settings.local_path)
    given = Path(settings.name_or_path)
    if given.is_dir():
        return check(given)
    if given.is_absolute() or settings.name_or_path.count("/") != 1 or settings.name_or_path.startswith("."):
        raise ArtifactError(
            f"model.name_or_path={settings.name_or_path}: no such folder, and not a hub id (owner/name)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    own = ["*.py", "*.tiktoken"] if settings.trust_remote_code else []
    patterns = [WEIGHT_FILES, "*.json", "*.txt", "*.model", "*.jinja", *own]
    try:
        folder = snapshot_download(settings.name_or_path, revision=settings.revision, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        local = f", or put its files in {settings.local_path}" if settings.local_path else ""
        raise ArtifactError(
            f"model.name_or_path={settings.name_or_path}: not a local folder, and not available on the hub "
            f"({type(error).__name__}). Give a folder{local}."
        ) from None
    return check(Path(folder))


def check(folder: Path) -> Path:
    """Returns `folder` if it holds a complete model in safetensors, else raises ArtifactError."""
    adapter = (folder / "adapter_config.json").is_file()
    if not (folder / "config.json").is_file():
        also = " (an adapter goes into vector.path, its base model into model.name_or_path)" * adapter
        if (folder / "backbone" / "config.json").is_file():  # of a run
            also = f": give {folder / 'backbone'}"
        raise ArtifactError(f"{folder} is no model folder: config.json is missing{also}")
    if adapter:
        raise ArtifactError(
            f"{folder} holds a whole model and an adapter (adapter_config.json), which would be loaded on top of it, "
            "for a second time where it is merged already. Move adapter_config.json and adapter_model.safetensors away"
        )
    weights = sorted(folder.glob(WEIGHT_FILES))
    if not weights:
        raise ArtifactError(
            f"{folder} holds no {WEIGHT_FILES}: other formats can run code when loaded; convert it first"
        )
    for file in weights:
        try:
            with safe_open(file, framework="pt") as tensors:
                tensors.keys()
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{file} is damaged or cut short ({error}): copy it again") from None
    return folder


def fingerprint(folder: Path) -> str:
    """16 hex digits of the SHA-256 of weights and config, of a model or an adapter: a name for records.

    What is cached is known by `secvec.runs.content.folder_digest`, which counts all that shapes an answer.
    """
    digest = hashlib.sha256()
    configs = [file for name in ("config.json", "adapter_config.json") if (file := folder / name).is_file()]
    for file in [*configs, *sorted(folder.glob(WEIGHT_FILES)), *folder.glob("adapter_model.bin")]:
        digest.update(bytes.fromhex(file_digest(file)))
    return digest.hexdigest()[:16]


def load_backbone(folder: Path, settings: ModelSettings) -> PreTrainedModel:
    """Loads the causal LM in `folder`, in eval mode. Raises ArtifactError."""
    how = {}
    if settings.quantization:
        how["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, settings.dtype),
        )
    model = _from_pretrained(folder, settings, **how)
    _check_tied(model, folder)
    _check_causal(model, folder)
    keep_packing(model)
    return prepared(model, settings)


def _check_bitsandbytes() -> None:
    """Raises ConfigError where weights cannot be held in 4 bits."""
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.quantization=nf4 needs bitsandbytes, which is not installed: pip install bitsandbytes, or "
            "model.quantization=null"
        )
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # an optional package

    try:
        dequantize_4bit(*quantize_4bit(torch.zeros(64, device="cuda" if torch.cuda.is_available() else "cpu")))
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise ConfigError(
            f"model.quantization=nf4: bitsandbytes {version('bitsandbytes')} cannot do it on this machine "
            f"({_reason(error)}). Install a newer one (pip install -U bitsandbytes), or set model.quantization=null"
        ) from None


def _from_pretrained(folder: Path, settings: ModelSettings, **where: Any) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, settings.dtype),
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **where,
        )
        model, found = loaded
    except LOADING_ERRORS as error:
        raise ArtifactError(f"{folder} cannot be loaded as a causal LM: {_reason(error)}") from None
    if lacking := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise ArtifactError(
            f"{folder}: its weights are not those of {type(model).__name__}, {len(lacking)} would stay random, "
            f"{lacking[0]} first. Give a model that was saved whole, with its language-model head"
        )
    return model  # type: ignore[no-any-return]


def _check_causal(model: PreTrainedModel, folder: Path) -> None:
    """Raises ArtifactError for an encoder: its tokens see those after them, so every answer would see itself."""
    embeddings: Any = model.get_input_embeddings()
    ids = torch.arange(3, 11, device=model.device).repeat(2, 1) % len(embeddings.weight)
    ids[1, -1] = 2
    with torch.no_grad(), in_eval(model), weights_at_hand(model):
        one, other = model(input_ids=ids, use_cache=False).logits[:, :-1]
    if not torch.allclose(one, other, atol=rounding(one.dtype) * float(one.abs().max()), rtol=0):
        raise ArtifactError(f"{folder}: {type(model).__name__} is no causal LM: a token sees those after it")


def _check_tied(model: PreTrainedModel, folder: Path) -> None:
    """Raises ArtifactError for a head of its own under a config that ties it to the embeddings: saving drops it."""
    tied, head = model.config.get_text_config().tie_word_embeddings, model.get_output_embeddings()
    if tied and head is not None and head.weight is not model.get_input_embeddings().weight:
        raise ArtifactError(
            f"{folder}: its output head has weights of its own, and its config says that they are those of the "
            'embeddings, so the head would be lost when the model is saved. Set "tie_word_embeddings": false in its '
            "config.json"
        )


def prepared(model: PreTrainedModel, settings: ModelSettings) -> PreTrainedModel:
    """`model` as the settings want it to compute."""
    if settings.gradient_checkpointing:
        how = {"use_reentrant": False, "context_fn": AdaptersOfForward(model)}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        model.enable_input_require_grads()
    if settings.packing:
        enable_packing(model)
    return model


def load_config(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a causal LM, without its weights. Raises ArtifactError for a model that cannot be trained here."""
    path = folder / "config.json"
    try:
        given = dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): copy it again") from None
    kind, code = given.get("model_type"), given.get("auto_map") or {}
    quantized = given.get("quantization_config") or (given.get("text_config") or {}).get("quantization_config")
    if quantized:
        raise ArtifactError(
            f"{path}: the weights are quantized ({quantized.get('quant_method', 'of an unnamed kind')}). Training "
            "needs unquantized weights: give the original model, or save this one once after `model.dequantize()`"
        )
    if kind not in CONFIG_MAPPING and code and not trust_remote_code:
        raise ArtifactError(
            f"{path}: a model of type {kind!r} that brings its own code ({', '.join(sorted(code))}). Read that code, "
            "then set model.trust_remote_code=true"
        )
    if kind not in CONFIG_MAPPING and not code:
        raise ArtifactError(
            f"{path}: transformers {transformers.__version__} knows no model_type {kind!r}"
            f"{nearest(str(kind), CONFIG_MAPPING)}. Install a version that does, or give another model"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except LOADING_ERRORS as error:
        raise ArtifactError(f"{path} cannot be read: {_reason(error)}") from None
    if "AutoModelForCausalLM" not in code and type(config) not in AutoModelForCausalLM._model_mapping:
        raise ArtifactError(f"{path}: {kind!r} is no causal LM. Give a model that continues a text, as Llama does")
    return config


def _reason(error: Exception) -> str:
    """What went wrong, with our names of settings."""
    text = one_line(error, 300)
    return text.replace("`trust_remote_code=True`", "model.trust_remote_code=true")


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer in `folder`; one without a pad token pads with eos.

    Raises ArtifactError; also for chat templates of which none is the default.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # `tokenizers` raises that very class
        raise ArtifactError(f"{folder} has no tokenizer that loads: {_reason(error)}") from None
    if not tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys():
        # made by transformers out of nothing, for some types of models, where the files are missing
        raise ArtifactError(
            f"{folder} has no tokenizer: no token of a text is in its vocabulary. Copy the tokenizer's files (at least "
            "tokenizer.json and tokenizer_config.json) of the model that it was made from into this folder"
        )
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise ArtifactError(
            f"{folder} has chat templates named {', '.join(sorted(tokenizer.chat_template))}, and none of them is the "
            'default: save the one to use as chat_template.jinja in that folder, or name it "default" in '
            "tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_savable(backbone: Backbone) -> None:
    """Raises ArtifactError for a model whose weights would not be those of the saved folder under the same names."""
    try:
        names = backbone.skeleton().state_dict().keys()
    except LOADING_ERRORS as error:
        raise ArtifactError(f"{backbone.folder} could not be saved after training: {_reason(error)}") from None
    loaded = _from_pretrained(backbone.folder, backbone.settings, device_map="meta")
    if differ := sorted(names ^ loaded.state_dict().keys()):
        raise ArtifactError(
            f"{backbone.folder} could not be saved after training: its config does not make the model that is loaded, "
            f"{len(differ)} weights differ, {differ[0]} first"
        )


def save_backbone(weights: Weights, like: Path, settings: ModelSettings, folder: Path) -> None:
    """Saves `weights` as a Hugging Face folder, with the config and tokenizer of the folder `like`.

    They are read file by file, MAX_SHARD_SIZE at a time: what transformers does for a model that it has put on disk.
    """
    model = Backbone(like, settings).skeleton()
    if _joins_weights(model):
        weights = Weights.of(weights.whole())
    hollow = {n: torch.empty(t.shape, dtype=t.dtype, device="meta") for n, t in weights.tensors.items()}
    before = dict(model.named_parameters())
    # assign=True uses the tensors of `hollow` themselves: their types, no initialisation
    _, unexpected = model.load_state_dict(hollow, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, parameter in model.named_parameters() if parameter is before.get(name)]
    if unexpected or left:
        raise AssertionError(f"the trained state is not that of the backbone: left {left}, unexpected {unexpected}")
    offloaded: Any = model
    offloaded.hf_device_map, offloaded._hf_hook = {"": "disk"}, SimpleNamespace(weights_map=weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Attempting to save a model with offloaded modules")
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    load_tokenizer(like, settings.trust_remote_code).save_pretrained(folder)
    if (like / "generation_config.json").is_file():
        shutil.copyfile(like / "generation_config.json", folder / "generation_config.json")


def _joins_weights(model: PreTrainedModel) -> bool:
    """Whether transformers saves several weights of such a model as one, and so must have them at the same time."""
    reverse = [one.reverse_transform() for one in get_model_conversion_mapping(model, add_legacy=False)]
    return any(isinstance(one, WeightConverter) and len(one.source_patterns) > 1 for one in reverse)


def set_trainable(model: nn.Module, part: str | None) -> None:
    """Gradients for the parameters of `part` (`vector`, `task`, `backbone`; None: no part) and for no others."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) == part)
        parameter.grad = None


@dataclass(frozen=True)
class LedgerRow:
    """One part of the model: its size, how much of it is trained, whether the forward pass uses it."""

    part: str
    parameters: int
    trainable: int
    active: bool


def ledger(model: nn.Module) -> list[LedgerRow]:
    """One row for each part that the model has."""
    total: dict[str, int] = {}
    trainable: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        size = shape_of(parameter).numel()
        total[part] = total.get(part, 0) + size
        trainable[part] = trainable.get(part, 0) + size * parameter.requires_grad
    active = active_parts(model)
    return [LedgerRow(part, total[part], trainable[part], part in active) for part in total]
