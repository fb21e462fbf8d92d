"""A model without its weights: its architecture from a folder, from a list of well-known models, or from the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from secvec.errors import ConfigError, nearest
from secvec.models.backbone import ledger, load_config
from secvec.planning.flops import Shape
from secvec.settings.schema import ModelSettings

_LLAMA2: dict[str, Any] = {"vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False}
_QWEN2: dict[str, Any] = {"max_position_embeddings": 32768}

KNOWN: dict[str, PretrainedConfig] = {
    "meta-llama/Llama-2-7b-chat-hf": LlamaConfig(
        **_LLAMA2, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    ),
    "meta-llama/Llama-2-13b-chat-hf": LlamaConfig(
        **_LLAMA2, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": Qwen2Config(
        **_QWEN2, vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
        **_QWEN2, vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": LlamaConfig(
        vocab_size=49152, max_position_embeddings=8192, hidden_size=576, intermediate_size=1536,
        num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    ),
}  # fmt: skip
"""By hub id, from the models' public config.json files."""


def architecture_of(settings: ModelSettings) -> tuple[PretrainedConfig, Path | None]:
    """From a local folder (returned too), else of a model known here, else from the hub. Raises ConfigError."""
    name = str(settings.name_or_path)
    for folder in (settings.local_path, Path(name)):
        if folder is not None and (folder / "config.json").is_file():
            return load_config(folder, settings.trust_remote_code), folder
    if name in KNOWN:
        return KNOWN[name], None
    try:
        found = AutoConfig.from_pretrained(
            name, revision=settings.revision, trust_remote_code=settings.trust_remote_code
        )
    except (OSError, ValueError):
        raise ConfigError(
            f"model.name_or_path={name}: no folder with a config.json, not to be had from the hub, and none of the "
            f"models known here{nearest(name, KNOWN)}: {', '.join(KNOWN)}"
        ) from None
    return found, None


def shape_of(model: Any) -> Shape:
    """The counts that the formulas need, of the backbone alone."""
    config = model.config
    weights = next(row.parameters for row in ledger(model) if row.part == "backbone")
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    stack = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=lambda m: sum(1 for _ in m.modules()))
    heads = config.num_attention_heads
    per_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        weights=weights,
        multiplied=weights - (0 if embedding is head else embedding.numel()),
        layer=next(row.parameters for row in ledger(stack[0]) if row.part == "backbone"),
        layers=int(config.num_hidden_layers),
        hidden=int(config.hidden_size),
        cache=2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * per_head,
        vocabulary=int(config.vocab_size),
    )
