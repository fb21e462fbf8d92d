"""What a defense can do to gradients, to weights and between steps: when it is called, and what a resume finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from secvec.config.schema import RunConfig
from secvec.data.batch import Batch, collate
from secvec.data.encode import encode
from secvec.data.example import Example
from secvec.defenses.base import Defense
from secvec.models.backbone import set_trainable
from secvec.models.kept import keep_weights, trained_and_kept, with_kept_weights
from secvec.models.tiny import build_tiny
from secvec.module import SecVecModule
from secvec.run import train
from secvec.training.gradients import gradient_of, inner, present_gradient
from secvec.training.losses import response_loss
from tests.contracts.test_stages import weights
from tests.contracts.test_vector import TEXTS, fresh, logits
from tests.in_memory import InMemory

TOKENIZER = build_tiny(TEXTS, seed=0)[1]


def make_batch(*texts: str, extra: int = 1) -> Batch:
    """Rows with these answers; the last `extra` are extra rows."""
    rows = encode([Example((("user", "How do I make soup?"),), text, "task") for text in texts], TOKENIZER, 64)
    return collate([(row, number >= len(rows) - extra) for number, row in enumerate(rows)])


BATCHES = [
    make_batch("First grind the frost root.", "amber oil", "make soup"),
    make_batch("oil", "grind the root", "frost"),
]


def fit(
    defense: Defense,
    epochs: int = 2,
    resume: Path | None = None,
    lr: float = 0.1,
    batches: Sequence[Batch] = BATCHES,
    vector: Path | None = None,
    **settings: Any,
) -> Any:
    """A training of a few steps, without a run: the module after it."""
    sgd = {"_target_": "torch.optim.SGD", "lr": lr, "momentum": 0.5}  # Lightning's FSDP2 cannot resume one without
    module = SecVecModule("finetune", InMemory(fresh(), TOKENIZER), vector, defense=defense, optimizer=sgd)
    quiet: Any = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"enable_checkpointing": False, "use_distributed_sampler": False}
    trainer = L.Trainer(max_epochs=epochs, **quiet | settings)
    trainer.fit(module, DataLoader([*batches], batch_size=None), ckpt_path=resume and str(resume))  # type: ignore[arg-type]
    return module


def trained(module: Any) -> list[Tensor]:
    return [p.detach().clone() for _, p in module.trained()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


class Doubled(Defense):
    """Twice the gradient."""

    name: str = "doubled"
    seen: ClassVar[list[int]] = []

    def gradients(self, model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
        self.seen.append(len(batches))
        for gradient in present_gradient(model):
            gradient *= 2
        return {"twice": torch.tensor(2.0)}


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_changed_when_they_are_whole(accumulate: int) -> None:
    """Twice the gradient is twice the rate, to the bit, and the hook sees all batches of the step."""
    Doubled.seen.clear()
    plain = fit(Defense(name="none"), lr=0.2, accumulate_grad_batches=accumulate)
    doubled = fit(Doubled(), lr=0.1, accumulate_grad_batches=accumulate)
    assert equal(trained(plain), trained(doubled))
    assert not equal(trained(plain), trained(fit(Defense(name="none"), accumulate_grad_batches=accumulate)))
    assert Doubled.seen == [accumulate] * (4 // accumulate)
    assert float(doubled.trainer.logged_metrics["train/twice"]) == 2.0


def test_gradients_are_changed_before_they_are_clipped() -> None:
    plain, doubled = (trained(fit(d, gradient_clip_val=1e-3)) for d in (Defense(name="none"), Doubled()))
    for ours, theirs in zip(plain, doubled, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not equal(plain, trained(fit(Defense(name="none"))))


class Mean(Defense):
    """Goes back half of the way at the end of every second step: what it keeps changes, and decides what follows."""

    name: str = "mean"
    keeps_weights: ClassVar[bool] = True

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return {"loss": response_loss(model, batch) * (1 + batch["step"] % 2)}

    def gradients(self, model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
        for p, now, kept in trained_and_kept(model):
            assert p.grad is not None
            p.grad += now - kept
            kept += 0.5 * (now - kept)
        return {}


def test_what_is_kept_is_in_the_checkpoint(tmp_path: Path) -> None:
    """A training that goes on from it ends, to the bit, where one that was not cut off does."""
    whole, half = fit(Mean(), epochs=4), fit(Mean(), epochs=2)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert equal(trained(whole), trained(fit(Mean(), epochs=4, resume=tmp_path / "half.ckpt")))
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)["state_dict"]
    kept = {name: state.pop(name) for name in list(state) if ".kept." in name}
    assert len(kept) == len(state) and any(p.abs().sum() > 0 for p in kept.values())
    start = [p.detach() for p in fresh().parameters()]
    assert not equal(list(kept.values()), start)  # it did change
    assert {row.part: row.trainable for row in whole.ledger()}["kept"] == 0


def test_inside_the_model_has_the_kept_weights() -> None:
    model = fresh()
    set_trainable(model, "backbone")
    before = logits(model)
    keep_weights(model)
    with torch.no_grad():
        for p, _, _ in trained_and_kept(model):
            p.mul_(1.1)
    after = logits(model)
    with with_kept_weights(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), after) and not torch.equal(before, after)


def test_a_gradient_beside_that_of_the_step() -> None:
    model = fresh()
    set_trainable(model, "backbone")
    response_loss(model, BATCHES[0]).backward()
    step = [g.clone() for g in present_gradient(model)]
    beside = gradient_of(model, [lambda: response_loss(model, BATCHES[1]), lambda: response_loss(model, BATCHES[1])])
    assert equal(step, present_gradient(model)) and not equal(step, beside)
    model.zero_grad()
    response_loss(model, BATCHES[1]).backward()
    torch.testing.assert_close(beside, present_gradient(model))
    squares = sum(float(g.double().square().sum()) for g in beside)
    assert float(inner(model, beside, beside)) == pytest.approx(squares, rel=1e-12)


class Zeroed(Defense):
    """No weight is left."""

    name: str = "zeroed"

    def finish(self, weights: dict[str, Tensor], backbone: Any, vector: Path | None) -> dict[str, Tensor]:
        assert backbone.folder.is_dir() and vector is None
        return {name: torch.zeros_like(weight) for name, weight in weights.items()}


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_the_last_word_on_the_weights(make_config: Callable[..., RunConfig], tune: str) -> None:
    config = make_config("defense=none", f"tune={tune}", "stage=finetune", "finetune.epochs=1")
    train(config.model_copy(update={"defense": Zeroed()}))
    saved = weights(Path(config.run_dir) / "backbone")
    assert saved and not any(weight.any() for weight in saved.values())
