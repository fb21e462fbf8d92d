"""A model that cannot be used is told in one message: the file, the reason, and the way out in our settings' names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertLMHeadModel, GPT2Config, LlamaConfig, MptConfig, Phi3Config

from secvec.config.schema import RunConfig
from secvec.errors import ArtifactError
from secvec.models.backbone import Backbone, context_of
from secvec.models.tiny import build_tiny
from secvec.run import train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "Model 2.5 (chat)"
    for part in build_tiny(["a word or two"] * 20, 0):
        part.save_pretrained(made)
    return made


def config_with(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantized (bitsandbytes)"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantized (gptq)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized (fp8)"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "quantized (awq)"),
        ({"model_type": "llamma"}, "did you mean 'llama'?"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnLM"}},
            "set model.trust_remote_code=true",
        ),
        ({"model_type": "t5"}, "'t5' is no causal LM"),
    ],
    ids=["bitsandbytes", "gptq", "fp8", "composite", "unknown type", "own code", "no causal LM"],
)
def test_what_cannot_be_trained_here(
    folder: Path, make_config: Callable[..., RunConfig], changes: dict[str, Any], says: str
) -> None:
    config_with(folder, **changes)
    with pytest.raises(ArtifactError, match=re.escape(says)) as caught:
        train(make_config("model=hf", f'model.name_or_path="{folder}"', small=False))
    assert str(folder / "config.json") in str(caught.value) and caught.value.exit_code == 2
    assert not (folder.parent / "run").exists()


def test_a_damaged_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"config\.json is damaged"):
        Backbone.of(folder)


def test_weights_that_would_stay_random(folder: Path) -> None:
    """transformers warns, and goes on with random weights."""
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"1 would stay random, model\.norm\.weight"):
        Backbone.of(folder).load()


def test_an_adapter_beside_whole_weights_is_not_added_in_silence(folder: Path) -> None:
    """transformers loads it by itself: a second time where it is merged already."""
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"Move adapter_config\.json and adapter_model\.safetensors away"):
        Backbone.of(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"an adapter goes into vector\.path"):
        Backbone.of(folder)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    """Each token of it sees those after it, so every answer would see itself."""
    _, tokenizer = build_tiny(["a word or two"] * 20, 0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    for is_decoder in (True, False):
        folder = tmp_path / str(is_decoder)
        config = BertConfig(vocab_size=len(tokenizer), is_decoder=is_decoder, initializer_range=0.5, **sizes)
        BertLMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    for load in (Backbone.load, Backbone.outline):  # whole, and for a process that will hold a shard
        load(Backbone.of(tmp_path / "True"))
        with pytest.raises(ArtifactError, match="BertLMHeadModel is no causal LM: a token sees those after it"):
            load(Backbone.of(tmp_path / "False"))


def test_the_context_of_a_model() -> None:
    """Beyond the first length of longrope a row would have another loss beside a long one than alone."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    lengths = {"max_position_embeddings": 160, "original_max_position_embeddings": 40}
    sizes = {"hidden_size": 64, "num_attention_heads": 4}
    assert context_of(Phi3Config(rope_parameters=rope, **lengths, **sizes)) == 40
    assert context_of(MptConfig(max_seq_len=64)) == 64 and context_of(GPT2Config(n_positions=32)) == 32
    assert context_of(LlamaConfig(max_position_embeddings=99)) == 99
