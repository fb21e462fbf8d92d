"""The gradient norms of the telemetry are those of its own samples."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from in_memory import module

from secvec.data.batch import collate
from secvec.data.embedded import Skill
from secvec.data.encode import encode
from secvec.models.tiny import build_tiny
from secvec.training.telemetry import Telemetry


def test_the_gradient_of_the_training_step_before_is_not_counted() -> None:
    """It is still there after the optimizer step; version 0.1 added it to the norm with the vector on."""
    examples = Skill().examples("test", 4, 0)
    model, tokenizer = build_tiny([text for e in examples for text in (e.prompt, e.response)], 0)
    trained = module(model, tokenizer)
    trained.configure_model()
    trained._trainer = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=torch.enable_grad))  # type: ignore[assignment]
    for parameter in trained.parameters():
        parameter.requires_grad_(True)
    rows = encode(examples, tokenizer, 512)
    telemetry = Telemetry({"undesired": rows}, 1)
    batch = collate([(row, False) for row in rows])
    clean, _ = telemetry._gradient_norm(trained, batch, True)
    for parameter in trained.parameters():
        parameter.grad = torch.ones_like(parameter)
    left_over, _ = telemetry._gradient_norm(trained, batch, True)
    assert clean > 0 and left_over == clean
