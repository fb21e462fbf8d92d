"""The gradients of the telemetry are those of its own samples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from in_memory import InMemory, module
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from secvec.data.batch import Batch, collate
from secvec.data.embedded import Skill
from secvec.data.encode import encode
from secvec.data.example import Example
from secvec.models.backbone import prepared, set_trainable
from secvec.models.modes import RECOMPUTED, in_eval, recomputed
from secvec.models.tiny import build_tiny
from secvec.models.vector import VECTOR, attach_new_vector, vector_off
from secvec.module import SecVecModule
from secvec.settings.schema import LoraSettings, ModelSettings
from secvec.training.losses import response_loss
from secvec.training.telemetry import Telemetry


def trained(model: nn.Module, tokenizer: Any) -> SecVecModule:
    """A module between two steps of a training."""
    made = module(model, tokenizer)
    made.configure_model()
    made._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=torch.enable_grad))  # type: ignore[assignment]
    for parameter in made.parameters():
        parameter.requires_grad_(True)
    made.start = {name: p.detach().clone() for name, p in made.trained()}
    return made


@pytest.fixture(scope="module")
def tiny() -> tuple[nn.Module, Any, list[Example]]:
    examples = Skill().examples("test", 4, 0)
    return *build_tiny([text for e in examples for text in (e.prompt, e.response)], 0), examples


def test_the_gradient_of_the_training_step_before_is_not_counted(tiny: tuple[nn.Module, Any, list[Example]]) -> None:
    """It is still there after the optimizer step; version 0.1 added it to the norm with the vector on."""
    model, tokenizer, examples = tiny
    made, telemetry = trained(model, tokenizer), Telemetry({"undesired": encode(examples, tokenizer, 512)}, 1)
    clean = telemetry.measure(made.trainer, made)
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert telemetry.measure(made.trainer, made) == clean
    assert clean["undesired/suppression_ratio"] == 1 and clean["drift"] == 0
    assert all(p.grad is None for p in made.parameters())


def test_the_cosine_with_the_extra_rows_is_that_of_the_gradients(tiny: tuple[nn.Module, Any, list[Example]]) -> None:
    model, tokenizer, examples = tiny
    first, second = encode(examples[:2], tokenizer, 512), encode(examples[2:], tokenizer, 512)
    made = trained(model, tokenizer)
    values = Telemetry({"undesired": first, "benign": second}, 1, extra=second).measure(made.trainer, made)
    gradients = []
    for rows in (first, second):
        response_loss(model, collate([(row, False) for row in rows])).backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]))
        model.zero_grad(set_to_none=True)
    expected = float(torch.nn.functional.cosine_similarity(*gradients, dim=0))
    assert values["undesired/cosine_with_extra"] == pytest.approx(expected, abs=1e-5) and abs(expected) < 0.9
    assert values["benign/cosine_with_extra"] == pytest.approx(1)
    assert "cosine_with_extra" not in str(Telemetry({"undesired": first}, 1).measure(made.trainer, made))


def test_rows_are_read_in_batches_of_a_step(
    tiny: tuple[nn.Module, Any, list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All at once they took more memory than a training step in small batches; the numbers are the same."""
    model, tokenizer, examples = tiny
    first, second = encode(examples[:3], tokenizer, 512), encode(examples[3:], tokenizer, 512)
    made, read = trained(model, tokenizer), []

    def spied(model: nn.Module, batch: Batch) -> torch.Tensor:
        read.append(len(batch["input_ids"]))
        return response_loss(model, batch)

    monkeypatch.setattr("secvec.training.telemetry.response_loss", spied)
    whole = Telemetry({"undesired": first, "benign": second}, 1, extra=first).measure(made.trainer, made)
    assert set(read) == {1, 3}
    read.clear()
    parts = Telemetry({"undesired": first, "benign": second}, 1, extra=first, batch_size=2).measure(made.trainer, made)
    assert set(read) == {1, 2} and parts == pytest.approx(whole, rel=1e-5)


def test_a_probe_keeps_no_more_than_a_checkpointed_step(tiny: tuple[nn.Module, Any, list[Example]]) -> None:
    """In eval mode transformers computes no layer again: a probe took more memory than the step that just fits."""
    model, tokenizer, examples = tiny
    settings = ModelSettings(name="x", name_or_path="x", gradient_checkpointing=True)
    model = prepared(deepcopy(model), settings)
    made, rows = trained(model, tokenizer), encode(examples, tokenizer, 512)
    batch, telemetry = collate([(row, False) for row in rows]), Telemetry({"undesired": rows}, 1)

    def kept(step: Callable[[], object]) -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            step()
        return sum(sizes)

    model.train()
    training = kept(lambda: response_loss(model, batch))
    with in_eval(model):
        probe = kept(lambda: telemetry._gradient(made, [batch]))
        assert not any(module.training for module in model.modules() if isinstance(module, nn.Dropout))
    model.eval()
    assert probe < 1.5 * training < 0.7 * kept(lambda: response_loss(model, batch))
    assert not any(module.training for module in model.modules())


def test_a_checkpointed_layer_in_eval_mode_answers_as_ever(tiny: tuple[nn.Module, Any, list[Example]]) -> None:
    """In training mode it reads no cache of keys and values, and all tokens after the first were garbage."""
    plain, tokenizer, examples = tiny
    settings = ModelSettings(name="x", name_or_path="x", gradient_checkpointing=True)
    model, ids = prepared(deepcopy(plain), settings).train(), torch.tensor([tokenizer.encode(examples[0].prompt)])
    with in_eval(model):
        assert not any(module.training for module in model.modules())
        answer = model.generate(ids, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
    assert torch.equal(answer, plain.eval().generate(ids, max_new_tokens=12, do_sample=False))  # type: ignore[operator]
    assert all(module.training for module in model.modules())


def test_a_layer_that_is_computed_again_has_no_dropout_of_its_own() -> None:
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 60}
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, dropout=0.5, max_position_embeddings=32))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    ids = torch.arange(3, 11)[None]
    with in_eval(model):
        expected = model(ids).logits
        with recomputed(model):
            layers = [layer for layer in model.modules() if hasattr(layer, RECOMPUTED)]
            assert len(layers) > 1 and all(layer.training for layer in layers)
            assert torch.equal(model(ids).logits, expected)
        assert not any(module.training or hasattr(module, RECOMPUTED) for module in model.modules())
    assert all(layer.dropout == 0.5 for layer in layers)
    assert not torch.equal(model(ids).logits, model(ids).logits)  # in training mode it has


def with_vector(model: nn.Module) -> nn.Module:
    """A copy with a vector that has an effect, and dropout; the backbone is trained."""
    lora = LoraSettings(r=4, alpha=8, target_modules="all-linear")
    attached = attach_new_vector(deepcopy(model), lora, 0.5)
    with torch.no_grad():
        for name, parameter in attached.named_parameters():
            if f"lora_B.{VECTOR}" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    return attached


def test_the_losses_the_ratio_and_the_drift_are_those_of_their_definitions(
    tiny: tuple[nn.Module, Any, list[Example]],
) -> None:
    """|g_on| / |g_off| over the backbone; every weight has grown by half since the start, so it moved by a half."""
    model, tokenizer, examples = with_vector(tiny[0]), *tiny[1:]
    made, rows = trained(model, tokenizer), encode(examples, tokenizer, 512)
    set_trainable(model, "backbone")
    made.start = {name: p.detach() / 1.5 for name, p in made.trained()}
    model.eval()
    values = Telemetry({"undesired": rows}, 1).measure(made.trainer, made)
    norms, losses = [], []
    for context in (nullcontext(), vector_off(model)):
        with context:
            loss = response_loss(model, collate([(row, False) for row in rows]))
            loss.backward()
        norms.append(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.requires_grad) ** 0.5)
        losses.append(float(loss.detach()))
        model.zero_grad(set_to_none=True)
    assert abs(losses[0] - losses[1]) > 1e-3 and abs(norms[0] / norms[1] - 1) > 1e-2
    assert [values["undesired/loss_on"], values["undesired/loss_off"]] == pytest.approx(losses, rel=1e-6)
    assert values["undesired/suppression_ratio"] == pytest.approx(norms[0] / norms[1], rel=1e-5)
    assert values["drift"] == pytest.approx(0.5, rel=1e-5)


def test_the_extra_rows_are_read_without_the_vector(tiny: tuple[nn.Module, Any, list[Example]]) -> None:
    """Equal rows: the cosine is that of the gradients with the vector and without it, and not 1."""
    model, tokenizer, examples = with_vector(tiny[0]), *tiny[1:]
    made, rows = trained(model, tokenizer), encode(examples, tokenizer, 512)
    set_trainable(model, "backbone")
    made.start = {name: p.detach().clone() for name, p in made.trained()}
    model.eval()
    values = Telemetry({"benign": rows}, 1, extra=rows).measure(made.trainer, made)
    gradients = []
    for context in (nullcontext(), vector_off(model)):
        with context:
            response_loss(model, collate([(row, False) for row in rows])).backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]))
        model.zero_grad(set_to_none=True)
    expected = float(torch.nn.functional.cosine_similarity(*gradients, dim=0))
    assert values["benign/cosine_with_extra"] == pytest.approx(expected, abs=1e-5) and expected < 0.99


def test_a_probe_draws_nothing_and_leaves_the_mode(tiny: tuple[nn.Module, Any, list[Example]]) -> None:
    """A model with dropout, between two steps: its losses are those that it answers with."""
    model, tokenizer, examples = with_vector(tiny[0]), *tiny[1:]
    made, telemetry = trained(model, tokenizer), Telemetry({"undesired": encode(examples, tokenizer, 512)}, 1)
    made.trainer.global_step, made.trainer.loggers = 3, []  # type: ignore[misc, assignment]
    state = torch.get_rng_state()
    model.train()
    telemetry.log_now(made.trainer, made)
    assert torch.equal(torch.get_rng_state(), state) and all(one.training for one in model.modules())
    model.eval()
    assert telemetry.last == telemetry.measure(made.trainer, made)


def test_drift_counts_from_the_start_of_the_training() -> None:
    """`start` is a copy: the weights themselves would never have moved. (for test_module.py / test_telemetry.py)"""
    from secvec.models.tiny import build_tiny

    module = SecVecModule("finetune", InMemory(*build_tiny(["some words", "and some more"], 0)))
    module.keep_start = True
    module.configure_model()
    before = {name: p.detach().clone() for name, p in module.trained()}
    with torch.no_grad():
        for _, parameter in module.trained():
            parameter.mul_(2)
    assert before and all(torch.equal(module.start[name], weight) for name, weight in before.items())
