"""Rows in one sequence without padding: the same losses and gradients, and no row sees another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Lfm2Config, Lfm2ForCausalLM, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from secvec.data.batch import Batch, Encoded, collate
from secvec.models.packing import enable_packing, pack, packs
from secvec.models.tiny import build_tiny
from secvec.training.losses import response_loss, token_losses

LENGTHS = (5, 13, 2, 9)
SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def tiny() -> Any:
    model = build_tiny(["What is cold is warm."] * 20, seed=0)[0]
    for parameter in model.parameters():  # as if trained: at the start the attention hardly matters
        parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = [Encoded(torch.randint(3, 60, (n,), generator=generator).tolist(), n // 2) for n in LENGTHS]
    return collate([(row, False) for row in rows])


def gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    response_loss(model, batch).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_losses_and_gradients_are_those_of_the_padded_batch(batch: Batch) -> None:
    model = tiny().double()
    losses, expected = token_losses(model, batch), gradients(model, batch)
    assert enable_packing(model) and packs(model, batch["attention_mask"])
    torch.testing.assert_close(token_losses(model, batch), losses, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients(model, batch), expected, rtol=1e-8, atol=1e-12)


def test_only_real_tokens_are_computed(batch: Batch) -> None:
    model, seen = tiny(), []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[:2].numel()))
    token_losses(model, batch)
    enable_packing(model)
    seen.append(0)
    token_losses(model, batch)
    hook.remove()
    assert seen[0] == len(LENGTHS) * max(LENGTHS) and seen[-1] == sum(LENGTHS)


def test_no_row_sees_another(batch: Batch) -> None:
    model = tiny()
    enable_packing(model)
    before = token_losses(model, batch)
    other = batch["input_ids"].clone()
    other[1, :5] = (other[1, :5] + 7) % 60
    after = token_losses(model, {**batch, "input_ids": other})
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]]) and not torch.equal(before[1], after[1])


def test_gradient_checkpointing_computes_each_row_alone_again(batch: Batch) -> None:
    model = tiny()
    enable_packing(model)
    expected = gradients(model.train(), batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(gradients(model, batch), expected)


def test_padded_batches_and_generation_are_as_before(batch: Batch) -> None:
    model = tiny().eval()
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    flipped = {name: tensor.flip(1) for name, tensor in given.items()}  # padded on the left
    results = []
    for _ in range(2):
        answer = model.generate(**flipped, max_new_tokens=5, do_sample=False, pad_token_id=0)
        results.append((model(**given).logits.detach(), answer))
        enable_packing(model)
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mamba", "lfm2"])
def test_a_model_that_mixes_neighbouring_tokens_keeps_its_padding(kind: str, dtype: torch.dtype, batch: Batch) -> None:
    """Also where what a row sees of another is no more than rounding."""
    torch.manual_seed(0)
    model: Any = (
        MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, state_size=4))
        if kind == "mamba"
        else Lfm2ForCausalLM(Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]))
    )
    before = token_losses(model.to(dtype).eval(), batch)
    assert not enable_packing(model) and not packs(model, batch["attention_mask"])
    assert torch.equal(token_losses(model, batch), before)


def test_a_model_in_bfloat16_is_packed(batch: Batch) -> None:
    assert enable_packing(tiny().bfloat16())


@pytest.mark.parametrize(("window", "packed"), [(None, True), (13, True), (12, False)])
def test_rows_beyond_the_window_of_the_attention_are_padded(window: int | None, packed: bool, batch: Batch) -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=window)).eval()
    before = token_losses(model, batch)
    assert enable_packing(model) and packs(model, batch["attention_mask"]) == packed
    torch.testing.assert_close(token_losses(model, batch), before)


def test_the_arguments_of_the_model_by_hand() -> None:
    ids = torch.tensor([[11, 12, 0], [13, 14, 15], [16, 0, 0]])
    found = pack(ids, (ids > 0).long(), ids.device)
    assert found["input_ids"].tolist() == [[11, 12, 13, 14, 15, 16]]
    assert found["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0]]
    assert found["attention_mask"].flatten().tolist() == [2, 3, 1]
