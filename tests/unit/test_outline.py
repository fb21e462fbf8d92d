"""A model whose weights stay on disk is the loaded model to the bit, with adapters too, and takes no memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from secvec.errors import ArtifactError
from secvec.models.backbone import Backbone
from secvec.models.outline import fill, tensors_of
from secvec.models.vector import attach_frozen_vector, attach_new_vector, attach_task, vector_off
from secvec.settings.schema import LoraSettings

LORA = LoraSettings(r=4, alpha=8, target_modules="all-linear")
SIZES = {"vocab_size": 300, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2}
MODELS = {
    "tied": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, hidden_size=32, intermediate_size=64, tie_word_embeddings=True)
    ),
    "untied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, hidden_size=32, intermediate_size=64)),
    "bfloat16 on disk": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, hidden_size=32, intermediate_size=64)).bfloat16(),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**SIZES, hidden_size=32, n_positions=64)),
}


def saved(kind: str, folder: Path) -> Backbone:
    torch.manual_seed(0)
    MODELS[kind]().save_pretrained(folder)
    return Backbone.of(folder)


def hollow(model: Any) -> int:
    """How many numbers the weights of `model` take memory for."""
    return sum(tensor.untyped_storage().nbytes() // tensor.itemsize for tensor in {*model.parameters()})


def compare(loaded: Any, outlined: Any) -> None:
    """All weights and buffers, in the order of the model; fills the second one."""
    fill(tensors_of(outlined))
    ours, theirs = ([*m.named_parameters(), *m.named_buffers()] for m in (outlined, loaded))
    assert [name for name, _ in ours] == [name for name, _ in theirs]
    for (name, one), (_, other) in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other) and one.requires_grad == other.requires_grad, name
    ids = torch.arange(8)[None]
    assert torch.equal(outlined(input_ids=ids).logits, loaded(input_ids=ids).logits)
    assert outlined.config.to_dict() == loaded.config.to_dict() and outlined.training == loaded.training


@pytest.mark.parametrize("kind", MODELS)
def test_it_is_the_loaded_model_with_the_same_new_adapters(kind: str, tmp_path: Path) -> None:
    backbone = saved(kind, tmp_path)
    compare(backbone.load(), backbone.outline())
    made = []
    for build in (backbone.load, backbone.outline):
        torch.manual_seed(1)
        model = build()
        if build == backbone.outline:
            assert hollow(model) == len({*model.parameters()})
        model = attach_task(attach_new_vector(model, LORA, 0.1), LORA)
        made.append((model, torch.rand(1)))
    (loaded, after), (outlined, also) = made
    assert torch.equal(after, also)
    assert 10 * hollow(outlined) < 9 * hollow(loaded)
    compare(loaded.eval(), outlined.eval())


@pytest.mark.parametrize("init", [True, "olora"])
def test_a_saved_vector_is_checked_on_it_as_on_a_loaded_one(tmp_path: Path, init: Any) -> None:
    backbone, folder = saved("untied", tmp_path / "model"), tmp_path / "vector"
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=init, task_type="CAUSAL_LM")
    adapter = get_peft_model(backbone.load(), config)
    with torch.no_grad():
        for parameter in (p for p in adapter.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter))
    adapter.save_pretrained(str(folder))
    if init == "olora":  # its base is another
        with pytest.raises(ArtifactError, match=r"off the logits are not those of the bare model.*olora"):
            attach_frozen_vector(backbone.outline(), folder)
        return
    loaded, outlined = (attach_frozen_vector(build(), folder) for build in (backbone.load, backbone.outline))
    compare(loaded, outlined)
    ids = torch.arange(8)[None]
    with vector_off(outlined):
        off = outlined(input_ids=ids).logits
    assert torch.equal(off, backbone.load()(input_ids=ids).logits)
    assert not torch.equal(off, outlined(input_ids=ids).logits)


def test_files_with_other_names_are_loaded_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """GPT-2's own files lack the prefix that transformers adds."""
    backbone = saved("gpt2", tmp_path)
    loaded = backbone.load()
    path = tmp_path / "model.safetensors"
    weights = {name.removeprefix("transformer."): weight for name, weight in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    outlined = backbone.outline()
    assert "loads it whole" in caplog.text and hollow(outlined) == hollow(loaded)
    compare(loaded, outlined)


def test_a_tied_head_that_lies_there_twice_stays_tied(tmp_path: Path) -> None:
    """Under fsdp the two were trained apart, and saving dropped the head."""
    backbone, file = saved("tied", tmp_path), tmp_path / "model.safetensors"
    held = load_file(file)
    save_file(held | {"lm_head.weight": held["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    compare(backbone.load(), backbone.outline())


def test_a_head_of_its_own_under_a_config_that_ties_it_is_refused(tmp_path: Path) -> None:
    """As a merged LoRA on the head leaves it: the saved backbone would have the embeddings for a head."""
    backbone, path = saved("untied", tmp_path), tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    for build in (backbone.load, backbone.outline):
        with pytest.raises(ArtifactError, match=r'Set "tie_word_embeddings": false'):
            build()
