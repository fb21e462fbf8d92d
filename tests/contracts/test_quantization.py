"""A frozen backbone in 4 bits: what it may not be used for, what knows of it, what is trained and saved beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, run_of
from pydantic import ValidationError

from secvec.config.schema import RunConfig
from secvec.errors import ConfigError, SecVecError
from secvec.evaluation import generation
from secvec.models import backbone as loading
from secvec.models.backbone import Backbone, ledger
from secvec.models.quantized import is_quantized
from secvec.models.tiny import build_tiny
from secvec.models.vector import attach_frozen_vector, merged_task, vector_off, why_not_merged, with_task
from secvec.run import train
from secvec.runs.keys import run_key

Make = Callable[..., RunConfig]
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "Model"
    for part in build_tiny([f"a word or two, number {i}" for i in range(20)], 0):
        part.save_pretrained(made)
    return made


def given(folder: Path, *more: str) -> list[str]:
    small = [text for text in SMALL if not text.startswith("model.align")]
    own = ["recipe=tiny", "model=hf", f"model.name_or_path={folder}", "model.quantization=nf4"]
    return [*small, *own, "trainer.accelerator=cpu", *more]


# -- what it may not be used for


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["tune=full"], "tune=full trains the weights that model.quantization=nf4 rounds: choose tune=lora"),
        (["tune=lora", "finetune.cycles=2"], "finetune.cycles > 1"),
        (["tune=lora", "defense.activation=merged"], "set defense.activation=adapter"),
        (["tune=lora", "defense=negated_vector"], "defense=negated_vector changes the backbone's own weights"),
        (["tune=lora", "defense=booster"], "defense=booster changes the backbone's own weights"),
        (["tune=lora", "trainer=fsdp", "trainer.devices=2"], "weights in 4 bits are not sharded. Choose trainer=ddp"),
        (["tune=lora", "model=tiny", "model.name_or_path=null"], "Set model.align=null"),
        (["tune=lora", "model.quantization=int3"], "nf4"),
    ],
    ids=lambda of: " ".join(of) if isinstance(of, list) else "",
)
def test_what_it_may_not_be_used_for(make_config: Make, folder: Path, more: list[str], says: str) -> None:
    with pytest.raises((SecVecError, ValidationError)) as caught:
        make_config(*given(folder, *more), small=False)
    assert says in " ".join(str(caught.value).split())


def test_the_vector_stage_alone_may_name_any_tuning(make_config: Make, folder: Path) -> None:
    assert make_config(*given(folder, "stage=vector", "tune=full"), small=False).model.quantization == "nf4"


def test_without_bitsandbytes_the_command_that_installs_it_is_named(
    make_config: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    config = make_config(*given(folder, "tune=lora"), small=False)
    with pytest.raises(ConfigError, match=r"pip install bitsandbytes, or model\.quantization=null"):
        train(config)
    assert not Path(config.run_dir).exists()


def test_vllm_would_load_the_whole_weights(make_config: Make, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_check_bitsandbytes", lambda: None)
    monkeypatch.setattr(generation, "uses_vllm", lambda *_: True)
    monkeypatch.setattr(generation, "backend_info", lambda *_: {})
    run = run_of(make_config(*given(folder, "tune=lora"), small=False))
    with pytest.raises(ConfigError, match="Set generation=hf"):
        run.inference_module(run.backbone)
    assert run.inference_module(run.backbone.at(folder)).generation.engine  # what is saved has plain weights


# -- what knows of it


def test_it_is_in_keys_and_hyperparameters(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_check_bitsandbytes", lambda: None)
    plain = Backbone.of(folder)
    rounded = Backbone.of({"name": None, "name_or_path": str(folder), "quantization": "nf4"})
    assert rounded.identity == [*plain.identity, "nf4"]
    again = Backbone.of(rounded.hyperparameters())
    assert again.settings.quantization == "nf4" and again.identity == rounded.identity
    assert rounded.at(folder).settings.quantization is None  # what was trained is not rounded again
    keys = {run_key({"model": one.settings.model_dump(mode="json")}) for one in (plain, rounded)}
    assert len(keys) == 2


# -- with bitsandbytes


@pytest.fixture
def base(make_config: Make) -> Path:
    """A model whose tokenizer knows the words of the data."""
    return run_of(make_config(run="base")).backbone.folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 40).view(3, 13)).logits  # type: ignore[no-any-return]


@needs_bitsandbytes
def test_all_stages_on_a_backbone_in_4_bits(make_config: Make, base: Path) -> None:
    config = make_config(*given(base, "tune=lora"), small=False)
    record = train(config)
    run, start = Path(config.run_dir), Backbone.of(config.model)
    rounded, plain = start.load(), Backbone.of(base).load()
    held = [parameter for parameter in rounded.parameters() if is_quantized(parameter)]
    assert len(held) == 7 * 3 and not torch.allclose(logits(rounded), logits(plain), atol=1e-3)
    assert ledger(rounded)[0].parameters == ledger(plain)[0].parameters  # it counts weights, not bytes
    assert record["ledger"]["backbone"] == [sum(p.numel() for p in plain.parameters()), 0, True]
    assert record["config"]["model"]["quantization"] == "nf4"

    saved = start.at(run / "backbone").load()  # plain weights, that answer as what was trained
    assert not any(map(is_quantized, saved.parameters()))
    assert "quantization_config" not in json.loads((run / "backbone" / "config.json").read_text())
    trained = with_task(rounded, run / "task")
    torch.testing.assert_close(logits(saved), logits(trained), rtol=0, atol=1e-4)
    merged = merged_task(trained)
    assert all(torch.equal(merged[name], weight) for name, weight in saved.state_dict().items())
    others = merged_task(with_task(plain, run / "task"))
    assert not torch.allclose(others["model.layers.0.mlp.up_proj.weight"], saved.model.layers[0].mlp.up_proj.weight)


@needs_bitsandbytes
def test_the_vector_is_taken_off_to_the_bit_and_never_acts_through_the_weights(make_config: Make, base: Path) -> None:
    config = make_config(*given(base, "stage=vector"), small=False)
    train(config)
    bare = Backbone.of(config.model).load()
    before = logits(bare)
    model = attach_frozen_vector(bare, Path(config.run_dir) / "vector")
    assert not torch.equal(logits(model), before) and why_not_merged(model) == ["the weights are in 4 bits"]
    with vector_off(model):
        assert torch.equal(logits(model), before)
