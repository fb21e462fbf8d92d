"""The vector acts through the weights as it acts beside them, and never gets into what is trained or saved."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_of
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from secvec.config.schema import RunConfig
from secvec.data.batch import Encoded, collate
from secvec.defenses.anchored_vector import AnchoredVector
from secvec.defenses.labelled_vector import LabelledVector
from secvec.defenses.security_vector import SecurityVector
from secvec.errors import ConfigError
from secvec.models.backbone import prepared, set_trainable
from secvec.models.vector import attach_new_vector, attach_task, save_adapter, vector_off
from secvec.settings.schema import LoraSettings, ModelSettings
from tests.contracts.test_foreign_adapters import lora, saved_by_peft
from tests.contracts.test_stages import finetuned, weights
from tests.contracts.test_vector import LORA, disturb, fresh, logits


def gpt2() -> nn.Module:
    """Its linear layers are `Conv1D`, with the weight the other way round."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {"linear": fresh, "conv1d": gpt2}


def defended(make: Callable[[], nn.Module], folder: Path, activation: Any) -> nn.Module:
    defense = SecurityVector(name="security_vector", activation=activation)
    model = defense.attach(make(), folder)
    set_trainable(model, "backbone")
    return model


@pytest.fixture(params=MODELS)
def make(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    return MODELS[request.param]


@pytest.fixture
def vector(make: Callable[[], nn.Module], tmp_path: Path) -> Path:
    model = attach_new_vector(make(), LORA.model_copy(update={"r": 2}), dropout=0.1)
    disturb(model, "vector")
    save_adapter(model, model.state_dict(), "vector", tmp_path / "vector")
    return tmp_path / "vector"


@contextmanager
def passes_beside_the_weights(model: nn.Module) -> Iterator[list[str]]:
    """Which of the vector's own layers are computed."""
    seen: list[str] = []
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, layer in model.named_modules()
        if "lora_A.security_vector" in name
    ]
    assert hooks
    yield seen
    for hook in hooks:
        hook.remove()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    ids = torch.arange(1, 40).view(3, 13)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_merged_is_the_same_function_with_the_same_gradient(make: Callable[[], nn.Module], vector: Path) -> None:
    """In float64, where rounding does not hide a difference."""
    beside, merged = (defended(make, vector, activation).double() for activation in ("adapter", "merged"))
    with passes_beside_the_weights(beside) as seen:
        expected = logits(beside)
    assert seen
    with passes_beside_the_weights(merged) as seen:
        torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-12)
    assert not seen
    ours, theirs, bare = gradients(merged), gradients(beside), gradients(make().double())
    assert ours.keys() == theirs.keys() and not any("lora" in name for name in ours) and len(ours) == len(bare)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert max(float(gradient.abs().max()) for gradient in bare.values()) > 0.01


def test_off_is_the_bare_base_to_the_bit_and_the_weights_never_hold_the_delta(
    make: Callable[[], nn.Module], vector: Path
) -> None:
    bare, model = make(), defended(make, vector, "merged")
    on = logits(model)
    assert (on - logits(bare)).abs().max() > 0.01
    with vector_off(model):
        assert torch.equal(logits(model), logits(bare))
    assert torch.equal(logits(model), on)
    state = model.state_dict()
    for name, tensor in bare.state_dict().items():
        key = f"base_model.model.{name}"
        found = state[key] if key in state else state[key.replace(".weight", ".base_layer.weight").replace(
            ".bias", ".base_layer.bias")]  # fmt: skip
        assert torch.equal(found, tensor), name


def test_under_autocast_the_sum_is_float32(make: Callable[[], nn.Module], vector: Path) -> None:
    """bf16-mixed rounds the sum once; the adapter beside the weight is rounded twice."""
    exact = logits(defended(make, vector, "adapter"))
    with torch.autocast("cpu", torch.bfloat16):
        beside, merged = (logits(defended(make, vector, kind)).float() for kind in ("adapter", "merged"))
    assert 0 < (merged - exact).abs().mean() < 1.2 * (beside - exact).abs().mean()


def test_gradient_checkpointing_computes_the_same(vector: Path, make: Callable[[], nn.Module]) -> None:
    expected = gradients(defended(make, vector, "merged"))
    model = defended(make, vector, "merged").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    for module in model.modules():  # GPT-2 has dropout of its own
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(gradients(model), expected)


def test_beside_a_task_lora_the_vector_is_an_adapter(tmp_path: Path) -> None:
    folder = saved_by_peft(lora(), tmp_path / "vector")
    merged, beside = (
        attach_task(SecurityVector(name="v", activation=kind).attach(fresh(), folder), LoraSettings(r=2, alpha=4,
                    target_modules=["q_proj"])) for kind in ("merged", "adapter")
    )  # fmt: skip
    for model in (merged, beside):
        disturb(model, "task")
    with passes_beside_the_weights(merged) as seen:
        torch.testing.assert_close(logits(merged), logits(beside))
    assert seen and all("q_proj" in name for name in seen)  # where there is no task LoRA it is merged


@pytest.mark.parametrize(
    ("config", "dtype", "says"),
    [
        (lora(use_dora=True), torch.float32, "more than a low-rank delta"),
        (lora(lora_bias=True), torch.float32, "more than a low-rank delta"),
        (lora(), torch.bfloat16, "the weights are bfloat16, not float32"),
    ],
    ids=["dora", "lora_bias", "bfloat16"],
)
def test_what_is_not_the_same_is_refused_or_left_beside(
    config: Any, dtype: torch.dtype, says: str, tmp_path: Path
) -> None:
    folder = saved_by_peft(config, tmp_path / "vector")
    with pytest.raises(ConfigError, match=f"{re.escape(says)}.*defense.activation=adapter"):
        defended(lambda: fresh().to(dtype), folder, "merged")
    auto, beside = (defended(lambda: fresh().to(dtype), folder, kind) for kind in ("auto", "adapter"))
    with passes_beside_the_weights(auto) as seen:
        assert torch.equal(logits(auto), logits(beside)) and seen


def test_a_vector_that_keeps_its_dropout_stays_beside(vector: Path, make: Callable[[], nn.Module]) -> None:
    (vector / "secvec.json").write_text('{"keep_dropout": true}')
    with pytest.raises(ConfigError, match="keeps its dropout"):
        defended(make, vector, "merged")
    with passes_beside_the_weights(defended(make, vector, "auto")) as seen:
        pass
    assert not seen


@pytest.mark.parametrize(
    ("optimizer", "steps"),
    [
        ("adamw", 20),
        pytest.param("adamw", 200, marks=pytest.mark.slow),
        pytest.param("sgd", 200, marks=pytest.mark.slow),
    ],
)
def test_many_steps_end_at_the_same_weights(
    make_config: Callable[..., RunConfig], tmp_path: Path, optimizer: str, steps: int
) -> None:
    """With weight decay, which acts on W and not on W + delta, and clipping."""
    common = [
        "data.num_harmful=80", "data.num_benign=80", f"finetune.epochs={steps // 20}", "finetune.batch_size=8",
        "optimizer.weight_decay=0.1", f"optimizer={optimizer}", "telemetry.every_n_steps=0",
        f"optimizer.lr={1e-4 if optimizer == 'adamw' else 0.05}", "trainer.gradient_clip_val=0.5",
    ]  # fmt: skip
    kinds = ("adapter", "merged")
    configs = [make_config(*common, f"defense.activation={kind}", run=kind) for kind in kinds]
    for config in configs:
        finetuned(config)
    adapter, merged = (weights(Path(config.run_dir) / "backbone") for config in configs)
    start = weights(run_of(configs[0]).backbone.folder)
    moved = sum(float((adapter[name] - start[name]).square().sum()) for name in start) ** 0.5
    apart = sum(float((adapter[name] - merged[name]).square().sum()) for name in start) ** 0.5
    assert moved > 0.1 and apart < 0.01 * moved
    losses = [curve(Path(config.run_dir)) for config in configs]
    assert len(losses[0]) == len(losses[1]) == steps and losses[0][0] > losses[0][-1]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def curve(folder: Path) -> list[float]:
    rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    stage, metric, value = (rows[0].index(name) for name in ("stage", "metric", "value"))
    return [float(row[value]) for row in rows[1:] if row[stage] == "finetune" and row[metric] == "train/loss"]


@pytest.mark.parametrize("activation", ["adapter", "merged"])
@pytest.mark.parametrize("kind", [LabelledVector, AnchoredVector])
def test_a_layer_that_is_computed_again_has_the_adapters_of_its_forward_pass(
    kind: Any, activation: str, vector: Path, make: Callable[[], nn.Module]
) -> None:
    """Under gradient checkpointing, in the backward pass, when `vector_off` has ended."""
    rows = [Encoded([1 + 3 * i + j for j in range(8)], 3, i % 2 == 0) for i in range(4)]
    batch, defense = collate([(row, i >= 2) for i, row in enumerate(rows)]), kind(name="d", activation=activation)
    found = []
    for checkpointing in (False, True):
        given: Any = {"name": None, "name_or_path": "x", "packing": False, "gradient_checkpointing": checkpointing}
        model = defense.attach(prepared(make(), ModelSettings(**given)), vector).train()  # type: ignore[arg-type]
        set_trainable(model, "backbone")
        for module in model.modules():  # GPT-2 has dropout of its own
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        defense.loss(model, batch)["loss"].backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(found[1], found[0])


def test_weights_in_half_precision_have_no_exact_sum(
    vector: Path, make: Callable[[], nn.Module], make_config: Any
) -> None:
    """`trainer.precision=bf16-true` converts the weights when the vector is attached already."""
    model = defended(make, vector, "auto")
    with passes_beside_the_weights(model) as seen:
        logits(model)
        assert not seen
        logits(model.bfloat16())
    assert seen
    with pytest.raises(ConfigError, match=r"precision=bf16-true has no such weights: set defense\.activation="):
        make_config("trainer.precision=bf16-true", "defense.activation=merged")
