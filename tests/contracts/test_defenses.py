"""Each defense of the bench computes what its source says, on numbers worked out by hand, and changes something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from secvec.config.schema import RunConfig
from secvec.defenses.negated_vector import NegatedVector
from secvec.defenses.random_adapter import RandomAdapter
from secvec.errors import ConfigError
from secvec.models.vector import _lora_layers, attach_frozen_vector, randomize_vector, vector_deltas
from tests.contracts.test_foreign_adapters import lora, saved_by_peft
from tests.contracts.test_vector import fresh, logits

Make = Callable[..., RunConfig]
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    return saved_by_peft(lora(), tmp_path / "vector")


class Loads:
    """A backbone that is in no folder."""

    def load(self) -> nn.Module:
        return fresh()


def products(model: nn.Module) -> list[Tensor]:
    """B A of each layer."""
    pairs = ((layer.lora_B["security_vector"], layer.lora_A["security_vector"]) for layer in _lora_layers(model))
    return [(b.weight @ a.weight).detach() for b, a in pairs]


def test_random_adapter_has_the_norm_of_the_vector_and_its_own_direction(vector: Path) -> None:

    def of_seed(seed: int) -> list[Tensor]:
        model = fresh()
        torch.manual_seed(seed)  # as a training does before it builds its model
        return products(RandomAdapter(name="random_adapter").attach(model, vector))

    drawn = of_seed(5)
    theirs = products(attach_frozen_vector(fresh(), vector))
    assert len(drawn) == len(theirs) > 1
    for ours, other in zip(drawn, theirs, strict=True):
        assert float(torch.linalg.norm(ours)) == pytest.approx(float(torch.linalg.norm(other)), rel=1e-5)
        assert abs(float(torch.cosine_similarity(ours.flatten(), other.flatten(), 0))) < 0.3
    assert all(map(torch.equal, drawn, of_seed(5))) and not torch.equal(drawn[0], of_seed(6)[0])


def test_random_adapter_is_active_as_the_vector_is(vector: Path) -> None:
    defense = RandomAdapter(name="random_adapter")
    found = []
    for kind in ("merged", "adapter"):
        model = fresh()
        torch.manual_seed(5)
        found.append(defense.model_copy(update={"activation": kind}).attach(model, vector))
    random, beside = found
    torch.testing.assert_close(logits(random), logits(beside))
    assert (logits(random) - logits(fresh())).abs().max() > 0.01


def test_random_adapter_is_scaled_by_hand(vector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws of ones: B A is 2 everywhere (r = 2), its norm 2 sqrt(mn). A and B become sqrt(norm / (2 sqrt(mn)))."""
    monkeypatch.setattr(torch, "randn", lambda shape, generator: torch.ones(shape))
    model = attach_frozen_vector(fresh(), vector)
    before = products(model)[0]
    randomize_vector(model, torch.Generator())
    layer = _lora_layers(model)[0]
    wanted = (float(torch.linalg.norm(before)) / (2 * before.numel() ** 0.5)) ** 0.5
    for part in (layer.lora_A, layer.lora_B):
        torch.testing.assert_close(
            part["security_vector"].weight, torch.full_like(part["security_vector"].weight, wanted)
        )


@pytest.mark.parametrize("config", [lora(use_dora=True), lora(lora_bias=True)], ids=["dora", "lora_bias"])
def test_a_vector_that_is_no_delta_is_refused(config: Any, tmp_path: Path) -> None:
    folder = saved_by_peft(config, tmp_path / "more")
    for use in (
        lambda: RandomAdapter(name="r", activation="adapter").attach(fresh(), folder),
        lambda: vector_deltas(fresh(), folder),
    ):
        with pytest.raises(ConfigError, match="takes a vector that is a low-rank delta of linear layers"):
            use()


def test_negated_vector_takes_the_delta_off(vector: Path) -> None:
    """W - 0.5 s B A, with s = alpha / r = 2."""
    from safetensors.torch import load_file

    saved = load_file(vector / "adapter_model.safetensors")
    name = f"base_model.model.{Q.removesuffix('.weight')}"
    delta = 2 * saved[f"{name}.lora_B.weight"] @ saved[f"{name}.lora_A.weight"]
    start = {name: weight.clone() for name, weight in fresh().state_dict().items()}
    found = NegatedVector(name="negated_vector", scale=0.5).finish(dict(start), Loads(), vector)  # type: ignore[arg-type]
    torch.testing.assert_close(found[Q], start[Q] - 0.5 * delta)
    assert delta.abs().max() > 0.01
    changed = {name for name in start if not torch.equal(found[name], start[name])}
    assert changed == {n for n in start if "q_proj.weight" in n or "v_proj.weight" in n}
    assert found.keys() == start.keys()


def test_negated_vector_undoes_a_merge(vector: Path) -> None:
    """The model with the vector, and the delta taken off its merged weights, is the bare model."""
    start = fresh().state_dict()
    deltas = vector_deltas(fresh(), vector)
    merged = {name: weight + deltas.get(name, 0) for name, weight in start.items()}
    found = NegatedVector(name="negated_vector").finish(merged, Loads(), vector)  # type: ignore[arg-type]
    for name, weight in start.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "conf" / "defense").glob("*.yaml")))
def test_the_docs_list_each_defense_with_its_needs(make_config: Make, name: str) -> None:
    defense = make_config(f"defense={name}").defense
    rows = [line.split(" | ") for line in (ROOT / "docs" / "defenses.md").read_text().splitlines()]
    (row,) = [row for row in rows if row[0] == f"| `{name}`"]
    assert row[3] == (", ".join(defense.needs) or "–")
    assert defense.name == name and (not defense.uses_vector or "undesired samples" in defense.needs)
