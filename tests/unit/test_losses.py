"""Losses per token: what counts, what does not, and that the KL term measures the vector alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import log
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from secvec.behaviors.forbidden_recipe import ForbiddenRecipe
from secvec.data.batch import IGNORE, Batch, Encoded, collate
from secvec.data.embedded import Ordinary
from secvec.data.encode import encode
from secvec.defenses.kl_to_base import KlToBase
from secvec.models.kept import keep_weights
from secvec.models.modes import in_eval
from secvec.models.tiny import CONTEXT, build_tiny
from secvec.models.vector import VECTOR, attach_new_vector, vector_off
from secvec.settings.schema import LoraSettings
from secvec.training import losses
from secvec.training.losses import (
    before_labels,
    global_mean,
    response_loss,
    token_nll,
    vector_loss,
)

LORA = LoraSettings(r=4, alpha=8, target_modules="all-linear")
UNDESIRED = ForbiddenRecipe().examples("vector", 3, 0)
BENIGN = Ordinary().examples("vector", 2, 0)


@pytest.fixture
def world() -> tuple[nn.Module, Any]:
    texts = [text for e in [*UNDESIRED, *Ordinary().examples("align", 100, 0)] for text in (e.prompt, e.response)]
    return build_tiny(texts, 0)


@pytest.fixture
def model(world: tuple[nn.Module, Any]) -> nn.Module:
    return world[0]


@pytest.fixture
def batch(world: tuple[nn.Module, Any]) -> Batch:
    """Three undesired rows, then two of the KL term; of different lengths."""
    tokenizer = world[1]
    rows = [(row, False) for row in encode(UNDESIRED, tokenizer, CONTEXT)]
    rows += [(row, True) for row in encode(BENIGN, tokenizer, CONTEXT)]
    made = collate(rows)
    assert (made["attention_mask"] == 0).any() and (made["labels"] != IGNORE).any()
    return made


def changed(batch: Batch, **tensors: Tensor) -> Batch:
    return Batch(**{**batch, **tensors})  # type: ignore[typeddict-item]


@contextmanager
def forward_passes(model: nn.Module) -> Iterator[list[int]]:
    """Rows of each forward pass through the whole model."""
    seen: list[int] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    yield seen
    handle.remove()


def perturb(model: nn.Module) -> nn.Module:
    """Gives the vector an effect."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"lora_B.{VECTOR}" in name:
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return model


def test_an_untrained_model_knows_nothing(model: nn.Module, batch: Batch) -> None:
    vocabulary = model.config.vocab_size  # type: ignore[union-attr]
    assert float(response_loss(model, batch).detach()) == pytest.approx(log(vocabulary), rel=0.05)  # type: ignore[arg-type]


def test_token_nll_is_the_gathered_log_softmax() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 11, generator=generator)
    labels = torch.tensor([[IGNORE, IGNORE, 3, 10, 0], [IGNORE, 7, 1, IGNORE, IGNORE]])
    expected = torch.zeros(2, 4)
    for row in range(2):
        for at in range(4):
            if labels[row, at + 1] != IGNORE:
                expected[row, at] = -logits[row, at].log_softmax(-1)[labels[row, at + 1]]
    assert (expected > 0).sum() == 5
    at = before_labels(labels)
    assert at.tolist() == [[False, True, True, True, False], [True, True, False, False, False]]
    torch.testing.assert_close(token_nll(logits[at], labels), expected)
    assert token_nll(logits[at].bfloat16(), labels).dtype == torch.float32


def test_response_loss_is_the_mean_over_all_response_tokens(model: nn.Module, batch: Batch) -> None:
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    nll = token_nll(logits[before_labels(batch["labels"])], batch["labels"])
    count = (batch["labels"] != IGNORE).sum()
    torch.testing.assert_close(response_loss(model, batch), nll.sum() / count)
    of_rows = nll.sum(1) / (batch["labels"] != IGNORE).sum(1)
    assert abs(float(of_rows.mean() - nll.sum() / count)) > 1e-6  # per token, not per row


def test_only_response_labels_count(model: nn.Module, batch: Batch) -> None:
    before = response_loss(model, batch)
    labels = batch["labels"]
    on_response = (labels != IGNORE).nonzero()[0]
    other = labels.clone()
    other[tuple(on_response)] = (other[tuple(on_response)] + 1) % 300
    assert float(response_loss(model, changed(batch, labels=other))) != float(before)
    padded = batch["input_ids"].clone()
    padded[batch["attention_mask"] == 0] = 17
    torch.testing.assert_close(response_loss(model, changed(batch, input_ids=padded)), before)


def test_the_output_head_is_computed_only_before_labels(model: nn.Module, batch: Batch) -> None:
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0]))  # type: ignore[operator]
    response_loss(model, batch)
    hook.remove()
    assert [len(hidden) for hidden in seen] == [int((batch["labels"][:, 1:] != IGNORE).sum())]
    assert model(batch["input_ids"]).logits.shape[:2] == batch["input_ids"].shape  # the model is as it was


def test_the_gradient_is_that_of_all_logits(model: nn.Module, batch: Batch) -> None:
    """The plain way: the logits of every token, the loss of Hugging Face."""
    gradients = []
    for loss in (
        response_loss(model, batch),
        model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss,  # type: ignore[literal-required]
    ):
        model.zero_grad()
        loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 5
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_fresh_vector_has_no_kl_and_a_changed_one_has(model: nn.Module, batch: Batch) -> None:
    vector = attach_new_vector(model, LORA, 0.0).train()
    terms = vector_loss(vector, batch, 3.0)
    assert float(terms["kl"]) == 0.0
    assert float(terms["loss"]) == float(terms["ce"]) > 0
    terms = vector_loss(perturb(vector), batch, 3.0)
    assert float(terms["kl"]) > 1e-4
    torch.testing.assert_close(terms["loss"].detach(), terms["ce"] + 3.0 * terms["kl"])


def test_the_kl_is_that_of_the_base_to_the_model_with_the_vector(model: nn.Module, batch: Batch) -> None:
    rows, mask = batch["input_ids"][batch["extra"]], batch["attention_mask"][batch["extra"]]
    base = model(rows, attention_mask=mask).logits.detach().log_softmax(-1)
    vector = perturb(attach_new_vector(model, LORA, 0.0))
    active = vector(input_ids=rows, attention_mask=mask).logits.detach().log_softmax(-1)
    total = 0.0
    for row, at in mask.nonzero().tolist():
        total += float((base[row, at].exp() * (base[row, at] - active[row, at])).sum())
    assert float(vector_loss(vector, batch, 1.0)["kl"]) == pytest.approx(total / int(mask.sum()), rel=1e-4)


def test_the_kl_term_trains_the_vector(model: nn.Module, batch: Batch) -> None:
    vector = perturb(attach_new_vector(model, LORA, 0.0))
    only_kl = changed(batch, labels=torch.full_like(batch["labels"], IGNORE))
    terms = vector_loss(vector, only_kl, 1.0)
    assert float(terms["ce"]) == 0.0 and float(terms["loss"].detach()) == float(terms["kl"])
    terms["loss"].backward()
    grads = [p.grad for name, p in vector.named_parameters() if f"lora_B.{VECTOR}" in name]
    assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_without_weight_there_is_one_forward_pass_and_the_plain_loss(model: nn.Module, batch: Batch) -> None:
    vector = perturb(attach_new_vector(model, LORA, 0.0))
    undesired = changed(batch, **{name: tensor[:3] for name, tensor in batch.items()})  # type: ignore[index]
    with forward_passes(vector) as seen:
        terms = vector_loss(vector, undesired, 0.0)
    assert seen == [3] and set(terms) == {"loss", "ce"}
    torch.testing.assert_close(terms["loss"], response_loss(vector, undesired))
    with forward_passes(vector) as seen:
        vector_loss(vector, batch, 1.0)
    assert seen == [5, 2]


def test_rows_of_the_kl_term_take_no_part_in_the_ce(model: nn.Module, batch: Batch) -> None:
    vector = perturb(attach_new_vector(model, LORA, 0.0))
    assert (batch["labels"][batch["extra"]] != IGNORE).any()
    ce = vector_loss(vector, batch, 1.0)["ce"]
    undesired = changed(batch, **{name: tensor[:3] for name, tensor in batch.items()})  # type: ignore[index]
    torch.testing.assert_close(ce, response_loss(vector, undesired).detach())
    assert abs(float(ce - response_loss(vector, batch))) > 1e-6


def test_rows_of_the_ce_take_no_part_in_the_kl(model: nn.Module, batch: Batch) -> None:
    vector = perturb(attach_new_vector(model, LORA, 0.0))
    other = batch["input_ids"].clone()
    other[:3, 2] = (other[:3, 2] + 1) % 300
    before, after = vector_loss(vector, batch, 1.0), vector_loss(vector, changed(batch, input_ids=other), 1.0)
    torch.testing.assert_close(before["kl"], after["kl"])
    assert float(before["ce"]) != float(after["ce"])


def test_a_process_without_kl_rows_in_its_share_goes_on(model: nn.Module, batch: Batch) -> None:
    vector = perturb(attach_new_vector(model, LORA, 0.0))
    undesired = changed(batch, **{name: tensor[:3] for name, tensor in batch.items()})  # type: ignore[index]
    terms = vector_loss(vector, undesired, 1.0)
    assert float(terms["kl"]) == 0.0
    terms["loss"].backward()


def test_global_mean_in_one_process_is_the_mean() -> None:
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    mean = global_mean(values.sum(), torch.tensor(3))
    assert float(mean.detach()) == 3.0
    mean.backward()
    torch.testing.assert_close(values.grad, torch.full((3,), 1 / 3))
    assert float(global_mean(torch.tensor(0.0), torch.tensor(0))) == 0.0


def test_what_the_vector_is_compared_with_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 has dropout of its own: the base's distribution is that of the model as it answers."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 60,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    lora = LoraSettings(r=2, alpha=4, target_modules="all-linear")
    model = attach_new_vector(GPT2LMHeadModel(GPT2Config(**sizes)), lora, 0.0)  # type: ignore[arg-type]
    model.train()
    batch, bases = collate([(Encoded([3, 4, 5, 6], 2), False), (Encoded([7, 8, 9], 1), True)]), list[Tensor]()
    compare = losses.divergence
    monkeypatch.setattr(losses, "divergence", lambda base, tuned: bases.append(base) or compare(base, tuned))
    for _ in range(2):
        vector_loss(model, batch, 1.0)
    assert torch.equal(*bases) and model.training
    with torch.no_grad(), vector_off(model):
        here = model.eval()(input_ids=torch.tensor([[7, 8, 9]])).logits[0]
    torch.testing.assert_close(bases[0], here)


def test_what_the_model_is_held_near_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, for the kept weights of `kl_to_base` and `safegrad`."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(**sizes, eos_token_id=2)).train()  # type: ignore[arg-type]
    keep_weights(model)
    batch, bases = collate([(Encoded([3, 4, 5, 6], 2), False), (Encoded([7, 8, 9], 1), False)]), list[Tensor]()
    compare = losses.divergence
    monkeypatch.setattr(losses, "divergence", lambda base, tuned: bases.append(base) or compare(base, tuned))
    for _ in range(2):
        assert float(KlToBase(name="kl_to_base").loss(model, batch)["kl"].detach()) > 0  # the model itself has dropout
    assert torch.equal(*bases) and model.training


@pytest.mark.parametrize("training", [True, False])
def test_a_model_comes_back_in_the_mode_that_it_was_in(training: bool) -> None:
    sizes = {"vocab_size": 60, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = GPT2LMHeadModel(GPT2Config(**sizes)).train(training)  # type: ignore[arg-type]
    with in_eval(model):
        assert not any(one.training for one in model.modules())
    assert all(one.training == training for one in model.modules())
