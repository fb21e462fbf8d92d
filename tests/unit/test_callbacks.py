"""The numbers that each training shows, against their definitions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from conftest import run_of
from in_memory import InMemory
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from secvec.behaviors.forbidden_recipe import ForbiddenRecipe
from secvec.config.schema import RunConfig
from secvec.data.example import Example
from secvec.errors import ConfigError
from secvec.evaluation.during_training import BehaviorDuringTraining
from secvec.judges.base import Judgement
from secvec.models.tiny import build_tiny
from secvec.models.vector import active_parts, attach_new_vector
from secvec.module import SecVecModule
from secvec.settings.schema import LoraSettings
from secvec.training.callbacks import TrainingMetrics

BATCHES = [
    {"x": torch.full((2, 3), float(i + 1)), "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])} for i in range(4)
]


class Linear(L.LightningModule):
    """y = w x, whose loss is its sum: the gradient of `w` is the sum of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.frozen = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3), requires_grad=False)

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return (batch["x"] * (self.w + self.frozen)).sum()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([self.w], lr=0.5)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), "interval": "step"}]


class Kept(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    name = version = "kept"  # type: ignore[assignment]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))


def fit(**given: Any) -> list[tuple[int | None, dict[str, float]]]:
    kept = Kept()
    trainer = L.Trainer(
        accelerator="cpu", logger=kept, callbacks=[TrainingMetrics()], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **{"max_epochs": 1, "log_every_n_steps": 1, **given},
    )  # fmt: skip
    trainer.fit(Linear(), DataLoader(BATCHES, batch_size=None))  # type: ignore[arg-type]
    return [(step, row) for step, row in kept.rows if "train/epoch" in row]


def test_norm_before_clipping_rate_of_the_step_and_part_of_the_epoch() -> None:
    shown = fit(gradient_clip_val=1e-3)
    assert [step for step, _ in shown] == [0, 1, 2, 3]
    for i, (_, row) in enumerate(shown):
        assert row["train/gradient_norm"] == pytest.approx(2 * (i + 1) * 3**0.5)  # two rows of i + 1 on three weights
        assert row["train/learning_rate"] == 0.5 * 0.5**i
        assert row["train/epoch"] == (i + 1) / 4 and row["train/tokens_per_second"] > 0


def test_a_step_of_two_batches_has_the_tokens_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("secvec.training.callbacks.time.perf_counter", lambda: float(next(clock)))
    accumulated = fit(accumulate_grad_batches=2)
    assert [(step, row["train/epoch"]) for step, row in accumulated] == [(0, 0.5), (1, 1.0)]
    assert [row["train/tokens_per_second"] for _, row in accumulated] == [3.0, 3.0]  # 2 x 3 tokens in 2 x 1 seconds
    assert accumulated[0][1]["train/gradient_norm"] == pytest.approx(3 * 3**0.5)  # the mean of two batches


def test_they_are_shown_as_often_as_the_trainer_logs() -> None:
    assert [step for step, _ in fit(log_every_n_steps=2)] == [1, 3]


def test_each_stream_s_own_limit_holds_during_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the final evaluation: an answer that is cut is another one."""
    asked: list[tuple[int, int]] = []

    def answers(model: Any, prompts: list[Any], limit: int, stop: Any) -> list[list[int]]:
        asked.append((len(prompts), limit))
        return [[len(prompt)] for prompt in prompts]

    model, tokenizer = build_tiny(["some words", "and more of them"], 0)
    module = SecVecModule("finetune", InMemory(model, tokenizer))
    module.model = model
    rows = [
        Example((("user", word),), "words", "task", max_new_tokens=limit)
        for word, limit in (("a", 9), ("b b", None), ("c", 9))
    ]
    monkeypatch.setattr("secvec.evaluation.during_training.generate", answers)
    monkeypatch.setattr("secvec.evaluation.during_training.decode", lambda ids, _: [str(*one) for one in ids])
    seen: list[Any] = []
    monkeypatch.setattr(
        "secvec.evaluation.during_training.judged", lambda *given: seen.append(given[3]) or [Judgement(None, None)] * 3
    )
    callback = BehaviorDuringTraining({"task": rows}, ForbiddenRecipe(name="x", sensitive=False), None, 1, 4)
    callback.measure(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), module)
    assert asked == [(1, 4), (2, 9)]
    (responses,) = seen
    assert responses[0] == responses[2] != responses[1]  # in the order of the prompts


@pytest.mark.parametrize("callback", ["early_stopping", "best_checkpoint"])
def test_a_loss_that_is_not_measured_is_refused_before_training(
    callback: str, make_config: Callable[..., RunConfig]
) -> None:
    """Lightning stops at the end of the first epoch, when the vector is trained already."""
    plain = ["defense=none", f"callbacks={callback}"]
    run_of(make_config(*plain)).check_monitors("finetune")
    run = run_of(make_config(*plain, "~data.benign.task"))
    with pytest.raises(ConfigError, match=rf"callbacks\.{callback}\.monitor=val/task_loss.*val/undesired_loss"):
        run.check_monitors("finetune")
    none = run_of(make_config(*plain, "evaluation.validation.num_samples=0"))
    with pytest.raises(ConfigError, match=r"there is nothing \(evaluation.validation.num_samples\)"):
        none.check_monitors("finetune")
    off = run_of(make_config(*plain, f"callbacks.{callback}.monitor=val/task_loss_vector_on"))
    with pytest.raises(ConfigError, match=r"val/task_loss_vector_on is not measured \(did you mean 'val/task_loss'"):
        off.check_monitors("finetune")
    for monitor in ("val_loss", "during/behavior_rate"):
        with pytest.raises(ConfigError, match=rf"monitor={monitor} is not measured.*of the training, train/loss"):
            run_of(make_config(*plain, f"callbacks.{callback}.monitor={monitor}")).check_monitors("finetune")
    for monitor in ("train/loss", "epoch"):
        run_of(make_config(*plain, f"callbacks.{callback}.monitor={monitor}")).check_monitors("finetune")


def test_limits_are_held_against_the_batches_of_an_epoch(make_config: Callable[..., RunConfig]) -> None:
    """Lightning looks when a training begins, which for the fine-tune is after the vector."""
    for given, says in (
        ("limit_train_batches=0.3", "leaves none of the 3 batches"),
        ("val_check_interval=4", "exceeds the 3 batches"),
    ):
        run = run_of(make_config(f"trainer.{given}"))
        run.check_limits(32, 8)
        with pytest.raises(ConfigError, match=says):
            run.check_limits(24, 8)
    over_epochs = ["trainer.val_check_interval=4", "trainer.check_val_every_n_epoch=null"]
    run_of(make_config(*over_epochs)).check_limits(24, 8)


def test_it_asks_before_the_first_step_and_after_every_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizer steps, here of two batches each; what the last one gives is not asked twice."""
    callback, seen = BehaviorDuringTraining({}, ForbiddenRecipe(), None, 2, 4), list[int]()
    monkeypatch.setattr(callback, "measure", lambda trainer, _: seen.append(trainer.global_step) or {})
    trainer: Any = SimpleNamespace(global_step=0, loggers=[])
    made = SimpleNamespace(device=torch.device("cpu"), model=nn.Linear(1, 1))
    callback.on_train_start(trainer, made)
    for batch in range(10):
        trainer.global_step = (batch + 1) // 2
        callback.on_train_batch_end(trainer, made, None, None, batch)
    callback.on_train_end(trainer, made)
    assert seen == [0, 2, 4, 5]


def test_during_training_the_model_answers_without_vector_and_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = build_tiny(["some words", "and more of them"], 0)
    model = attach_new_vector(model, LoraSettings(r=2, alpha=4, target_modules="all-linear"), 0.5).train()
    made = SecVecModule("finetune", InMemory(model, tokenizer))
    made.model, seen = model, list[Any]()

    def answers(model: nn.Module, prompts: list[Any], *_: Any) -> list[list[int]]:
        seen.append((active_parts(model), [one for one in model.modules() if one.training]))
        return [[5]] * len(prompts)

    monkeypatch.setattr("secvec.evaluation.during_training.generate", answers)
    rows = [Example((("user", "a"),), "words", "task")]
    callback = BehaviorDuringTraining({"task": rows}, ForbiddenRecipe(name="x", sensitive=False), None, 1, 4)
    callback.log_now(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), made)
    assert seen == [({"backbone"}, [])]
    assert "vector" in active_parts(model) and all(one.training for one in model.modules())
