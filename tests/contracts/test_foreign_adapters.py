"""What PEFT can save, given as a vector: on as PEFT has it and off as the bare base, to the bit, or refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file

from secvec.config.schema import RunConfig
from secvec.errors import ArtifactError
from secvec.models.backbone import load_backbone
from secvec.models.vector import attach_frozen_vector, check_adapter, has_vector, vector_off
from secvec.run import train
from tests.contracts.test_stages import same, weights
from tests.contracts.test_vector import fresh, logits

ATTENTION = ["q_proj", "v_proj"]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ATTENTION, "task_type": "CAUSAL_LM"} | settings)


def saved_by_peft(config: Any, folder: Path) -> Path:
    model = get_peft_model(fresh(), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(use_dora=True),
        lora(use_rslora=True, lora_alpha=7),
        lora(target_modules=r".*\.(q|down)_proj"),
        lora(lora_bias=True),
        lora(rank_pattern={"q_proj": 1}, alpha_pattern={"v_proj": 3}),
        lora(init_lora_weights="olora"),  # saved by PEFT with the change that it makes to the base undone or not
    ],
    ids=["plain", "dora", "rslora", "regex", "lora_bias", "patterns", "olora"],
)
def test_on_is_what_peft_gives_and_off_the_bare_base(config: LoraConfig, tmp_path: Path) -> None:
    folder = saved_by_peft(config, tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"a_key_of_a_newer_peft": None}))
    if config.init_lora_weights == "olora":
        with pytest.raises(ArtifactError, match=r"off the logits are not those of the bare model.*olora"):
            attach_frozen_vector(fresh(), folder)
        return
    model = attach_frozen_vector(fresh(), folder).eval()
    theirs, bare = logits(PeftModel.from_pretrained(fresh(), str(folder)).eval()), logits(fresh())
    assert has_vector(model) and torch.equal(logits(model), theirs) and not torch.equal(theirs, bare)
    with vector_off(model):
        assert torch.equal(logits(model), bare)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (lora(bias="all"), "bias='all'"),
        (lora(modules_to_save=["lm_head"]), "modules_to_save=['lm_head']"),
        (lora(target_modules=["embed_tokens", "q_proj"]), "its file holds weights of the backbone"),
        (lora(target_modules=["lm_head", "q_proj"]), "its file holds weights of the backbone"),
        (lora(trainable_token_indices=[1, 2]), "trainable_token_indices=[1, 2]"),
        (LoHaConfig(r=2, target_modules=ATTENTION), "peft_type='LOHA'"),
        (IA3Config(target_modules=ATTENTION, feedforward_modules=[]), "peft_type='IA3'"),
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "peft_type='PROMPT_TUNING'"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "peft_type='PREFIX_TUNING'"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_what_acts_when_it_is_off_is_refused_by_name(config: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=re.escape(says)):
        attach_frozen_vector(fresh(), saved_by_peft(config, tmp_path / "adapter"))


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_an_adapter_saved_with_the_embeddings_is_refused_before_anything_is_trained(safe: bool, tmp_path: Path) -> None:
    """PEFT loads them over those of a fine-tuned backbone. On the base they are the same, and no logits tell."""
    folder = saved_by_peft(lora(), tmp_path / "adapter")
    check_adapter(folder)
    model = PeftModel.from_pretrained(fresh(), str(folder))
    model.save_pretrained(str(tmp_path / "with"), save_embedding_layers=True)
    if not safe:
        torch.save(load_file(tmp_path / "with" / "adapter_model.safetensors"), tmp_path / "with" / "adapter_model.bin")
        (tmp_path / "with" / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"its file holds weights of the backbone.*save_embedding_layers=False"):
        check_adapter(tmp_path / "with")


def test_an_adapter_that_does_not_match_a_layer_is_refused(tmp_path: Path) -> None:
    """PEFT warns, and goes on with an adapter that does nothing."""
    folder = saved_by_peft(lora(), tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"target_modules": ["k_proj"]}))
    with pytest.raises(ArtifactError, match=r"does not fit this model.*missing adapter keys"):
        attach_frozen_vector(fresh(), folder)


@pytest.mark.parametrize("defense", ["none", "security_vector"])
def test_at_a_rate_of_nothing_the_saved_backbone_is_the_base(
    make_config: Callable[..., RunConfig], defense: str
) -> None:
    from conftest import run_of

    config = make_config(f"defense={defense}", "optimizer.lr=1e-40", "telemetry.every_n_steps=0")
    base = run_of(config).backbone
    for stage in ("vector", "finetune") if defense != "none" else ("finetune",):
        train(config.model_copy(update={"stage": stage}))
    saved = Path(config.run_dir) / "backbone"
    assert same(weights(saved), weights(base.folder))
    assert torch.equal(logits(load_backbone(saved, config.model)), logits(base.load()))
