"""`model.compile`: compiled layers train as the others do, to rounding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

from secvec.models.packing import enable_packing
from secvec.module import SecVecModule
from tests.contracts.test_defense_hooks import BATCHES, TOKENIZER, trained
from tests.contracts.test_foreign_adapters import lora, saved_by_peft
from tests.contracts.test_vector import fresh
from tests.in_memory import InMemory


@pytest.fixture(autouse=True)
def _nothing_is_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def fit(compile: str | None, vector: Path) -> list[Tensor]:
    model = fresh()
    assert enable_packing(model)
    backbone = InMemory(model, TOKENIZER, compile=compile)
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.05}
    module = SecVecModule("finetune", backbone, vector, optimizer=sgd)
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    L.Trainer(max_epochs=3, accelerator="cpu", enable_checkpointing=False, **quiet).fit(
        module, DataLoader([*BATCHES], batch_size=None)
    )
    return trained(module)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_layers_train_as_the_others_do(backend: str, tmp_path: Path) -> None:
    vector = saved_by_peft(lora(), tmp_path / "vector")
    plain = fit(None, vector)
    assert not counters["stats"]["unique_graphs"]
    compiled = fit(backend, vector)
    assert counters["stats"]["unique_graphs"] >= 2
    start = [p.detach() for p in fresh().parameters()]
    for ours, other, before in zip(compiled, plain, start, strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)
        assert not torch.equal(other, before)
