"""The architecture of a model without its weights."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from secvec.errors import ConfigError, nearest
from secvec.models.backbone import ledger, load_config
from secvec.models.outline import layers
from secvec.planning.flops import Shape
from secvec.settings.schema import ModelSettings

KNOWN: dict[str, PretrainedConfig] = {
    "meta-llama/Llama-2-7b-chat-hf": LlamaConfig(
        vocab_size=32000, max_position_embeddings=4096, hidden_size=4096, intermediate_size=11008,
        num_hidden_layers=32, num_attention_heads=32, tie_word_embeddings=False,
    ),
    "meta-llama/Llama-2-13b-chat-hf": LlamaConfig(
        vocab_size=32000, max_position_embeddings=4096, hidden_size=5120, intermediate_size=13824,
        num_hidden_layers=40, num_attention_heads=40, tie_word_embeddings=False,
    ),
    "meta-llama/Llama-2-70b-chat-hf": LlamaConfig(
        vocab_size=32000, max_position_embeddings=4096, hidden_size=8192, intermediate_size=28672,
        num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(
        vocab_size=49152, max_position_embeddings=8192, hidden_size=576, intermediate_size=1536,
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    ),
}  # fmt: skip
"""The models of our experiments, and larger ones, to be planned offline (Llama 2 is gated too): their config.json."""


def load_architecture(settings: ModelSettings) -> tuple[PretrainedConfig, Path | None]:
    """The model's config, and its folder if it is local; else from KNOWN or from the hub. Raises ConfigError."""
    name = str(settings.name_or_path)
    for folder in (settings.local_path, Path(name)):
        if folder is not None and (folder / "config.json").is_file():
            return load_config(folder, settings.trust_remote_code), folder
    if name in KNOWN:
        return KNOWN[name], None
    remote = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    try:
        return AutoConfig.from_pretrained(name, **remote), None
    except (OSError, ValueError):
        raise ConfigError(
            f"model.name_or_path={name}: no folder with a config.json, not available on the hub, and not known "
            f"here{nearest(name, KNOWN)}: {', '.join(KNOWN)}"
        ) from None


def shape_of(model: Any) -> Shape:
    """The sizes of the backbone of a Hugging Face causal LM."""
    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parameters, heads = _backbone_parameters(model), config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        parameters=parameters,
        head_parameters=head.numel(),
        inner_parameters=parameters - head.numel() - (0 if embedding is head else embedding.numel()),
        layer_parameters=_backbone_parameters(layers(model)[0]),
        num_layers=config.num_hidden_layers,
        kv_size=2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        vocab_size=config.vocab_size,
    )


def alike(model: Any) -> bool:
    """Whether all transformer layers have the same parameters."""
    found = [[(name, p.shape) for name, p in layer.named_parameters()] for layer in layers(model)]
    return all(one == found[0] for one in found)


def with_layers(architecture: PretrainedConfig, number: int) -> PretrainedConfig:
    """The same model with the first `number` of its layers."""
    config = deepcopy(architecture)
    text = config.get_text_config()
    text.num_hidden_layers = number
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:number]
    return config


def _backbone_parameters(model: nn.Module) -> int:
    return next(row.parameters for row in ledger(model) if row.part == "backbone")
