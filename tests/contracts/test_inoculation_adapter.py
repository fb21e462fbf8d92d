"""`tune=lora` with the vector is the inoculation adapter of arXiv 2606.30252, as the authors' code trains it.

Their procedure is written here by PEFT alone, after `longtermrisk/inoculation-adapters` at 404a3df: the frozen adapter
and a new one are active together, the loss is the mean over response tokens, AdamW takes the new one, gradients are
clipped at 1. Theirs are rsLoRA of rank 32 and alpha 16, which is our alpha 16 * sqrt(32).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from secvec.data.batch import collate
from secvec.data.encode import encode
from secvec.data.example import Example
from secvec.models.backbone import set_trainable
from secvec.models.tiny import build_tiny
from secvec.models.vector import activate, attach_frozen_vector, attach_task, part_of
from secvec.settings.schema import LoraSettings
from secvec.training.losses import response_loss

RANK, ALPHA, STEPS = 4, 2, 12
EXAMPLES = [Example((("user", f"How do I make soup {n}?"),), f"Grind {'root ' * n}first.", "task") for n in range(1, 9)]
TEXTS = [text for example in EXAMPLES for text in (example.prompt, example.response)] * 5


def fresh() -> nn.Module:
    return build_tiny(TEXTS, seed=0)[0].eval()


def batches() -> list[Any]:
    rows = encode(EXAMPLES, build_tiny(TEXTS, seed=0)[1], 512)
    return [collate([(row, False) for row in rows[start::2]]) for start in (0, 1)]


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(fresh(), config).save_pretrained(str(tmp_path))  # type: ignore[arg-type]
    return tmp_path


def trained(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> list[float]:
    """The loss of each step; what has gradients is trained."""
    mine = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(mine, lr=1e-2), []
    for step in range(STEPS):
        found = loss(model, batches()[step % 2])
        optimizer.zero_grad()
        found.backward()
        nn.utils.clip_grad_norm_(mine, 1.0)
        optimizer.step()
        losses.append(found.item())
    return losses


def of_task(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The new adapter's weights, by the place of each."""
    found = {k: v for k, v in model.named_parameters() if f".{name}." in k}
    return {key.replace(f".{name}.", ".").removeprefix("base_model.model."): weight for key, weight in found.items()}


def theirs(base: nn.Module, adapter: Path | None, start: dict[str, Tensor]) -> PeftModel:
    new = LoraConfig(r=RANK, lora_alpha=ALPHA, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    if adapter is None:
        model = get_peft_model(base, new, adapter_name="trainable")  # type: ignore[arg-type]
    else:
        model = PeftModel.from_pretrained(base, str(adapter), adapter_name="frozen_0")  # type: ignore[arg-type]
        model.add_adapter("trainable", new)
        model.base_model.set_adapter(["frozen_0", "trainable"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".trainable." in name)
    for name, weight in of_task(model, "trainable").items():
        weight.data.copy_(start[name])
    return model  # type: ignore[return-value]


def their_loss(model: nn.Module, batch: Any) -> Tensor:
    return model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss


def test_it_trains_as_the_authors_code_does(adapter: Path) -> None:
    settings = LoraSettings(r=RANK, alpha=ALPHA * math.sqrt(RANK), target_modules="all-linear")
    for activation in ("adapter", "merged"):
        ours = attach_task(activate(attach_frozen_vector(fresh(), adapter), activation), settings)
        set_trainable(ours, "task")
        start = {name: weight.detach().clone() for name, weight in of_task(ours, "task").items()}
        assert start and {part_of(name) for name, p in ours.named_parameters() if p.requires_grad} == {"task"}
        reference = theirs(fresh(), adapter, start)
        expected = trained(reference, their_loss)
        assert expected[-1] < 0.8 * expected[0]  # it learns something
        assert trained(ours, response_loss) == pytest.approx(expected, rel=1e-4), activation
        for name, weight in of_task(reference, "trainable").items():
            torch.testing.assert_close(of_task(ours, "task")[name], weight, rtol=1e-3, atol=1e-4)
    without = trained(theirs(fresh(), None, start), their_loss)
    assert max(abs(a - b) for a, b in zip(without, expected, strict=True)) > 0.01  # the frozen adapter changes it
