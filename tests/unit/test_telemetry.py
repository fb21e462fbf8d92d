"""The gradients of the telemetry are those of its own samples."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from in_memory import module
from torch import nn

from secvec.data.batch import Batch, collate
from secvec.data.embedded import Skill
from secvec.data.encode import encode
from secvec.data.example import Example
from secvec.models.backbone import prepared
from secvec.models.modes import in_eval
from secvec.models.tiny import build_tiny
from secvec.module import SecVecModule
from secvec.settings.schema import ModelSettings
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
    clean = telemetry._measure(made, model)
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert telemetry._measure(made, model) == clean
    assert clean["undesired/suppression_ratio"] == 1 and clean["drift"] == 0
    assert all(p.grad is None for p in made.parameters())


def test_the_cosine_with_the_extra_rows_is_that_of_the_gradients(tiny: tuple[nn.Module, Any, list[Example]]) -> None:
    model, tokenizer, examples = tiny
    first, second = encode(examples[:2], tokenizer, 512), encode(examples[2:], tokenizer, 512)
    made = trained(model, tokenizer)
    values = Telemetry({"undesired": first, "benign": second}, 1, extra=second)._measure(made, model)
    gradients = []
    for rows in (first, second):
        response_loss(model, collate([(row, False) for row in rows])).backward()
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]))
        model.zero_grad(set_to_none=True)
    expected = float(torch.nn.functional.cosine_similarity(*gradients, dim=0))
    assert values["undesired/cosine_with_extra"] == pytest.approx(expected, abs=1e-5) and abs(expected) < 0.9
    assert values["benign/cosine_with_extra"] == pytest.approx(1)
    assert "cosine_with_extra" not in str(Telemetry({"undesired": first}, 1)._measure(made, model))


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
    whole = Telemetry({"undesired": first, "benign": second}, 1, extra=first)._measure(made, model)
    assert set(read) == {1, 3}
    read.clear()
    parts = Telemetry({"undesired": first, "benign": second}, 1, extra=first, batch_size=2)._measure(made, model)
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
