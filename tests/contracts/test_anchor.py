"""The anchor: rows of every batch that are read without the vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_of
from torch import Tensor, nn

from secvec.config.schema import RunConfig
from secvec.data.batch import IGNORE, Batch, collate, count_tokens
from secvec.data.datamodule import SecVecDataModule
from secvec.data.encode import encode
from secvec.data.example import Example
from secvec.defenses.anchored_vector import AnchoredVector
from secvec.errors import ConfigError
from secvec.models.backbone import set_trainable
from secvec.models.kept import keep_weights
from secvec.models.tiny import build_tiny
from secvec.models.vector import vector_off
from secvec.module import SecVecModule
from secvec.run import train
from secvec.training.losses import label_logits, response_loss
from tests.contracts.test_activation import gradients as gradients_of_all
from tests.contracts.test_foreign_adapters import lora, saved_by_peft
from tests.contracts.test_stages import finetuned, weights
from tests.contracts.test_vector import TEXTS, fresh

Make = Callable[..., RunConfig]


@pytest.fixture
def anchored(tmp_path: Path) -> tuple[AnchoredVector, nn.Module]:
    defense = AnchoredVector(name="anchored_vector", weight=0.5)
    model = defense.attach(fresh(), saved_by_peft(lora(), tmp_path / "vector"))
    set_trainable(model, "backbone")
    return defense, model


@pytest.fixture
def batch() -> Batch:
    tokenizer = build_tiny(TEXTS, seed=0)[1]
    texts = [
        ("How do I make soup?", "First grind the frost root."),
        ("frost root?", "amber oil"),
        ("soup", "make soup"),
    ]
    rows = encode([Example((("user", p),), r, "task") for p, r in texts], tokenizer, 64)
    return collate([(row, number > 0) for number, row in enumerate(rows)])


def part(batch: Batch, rows: Tensor) -> Batch:
    return {**batch, **{name: batch[name][rows] for name in ("input_ids", "attention_mask", "labels", "extra")}}  # type: ignore[typeddict-item, literal-required]


def test_the_data_are_read_with_the_vector_and_the_anchor_without_it(
    anchored: tuple[AnchoredVector, nn.Module], batch: Batch
) -> None:
    defense, model = anchored
    terms = defense.loss(model, batch)
    data, anchor = part(batch, ~batch["extra"]), part(batch, batch["extra"])
    torch.testing.assert_close(terms["data"], response_loss(model, data).detach())
    with vector_off(model):
        torch.testing.assert_close(terms["anchor"], response_loss(model, anchor).detach())
    assert abs(float(terms["anchor"] - response_loss(model, anchor))) > 1e-3  # the vector would change it
    torch.testing.assert_close(terms["loss"].detach(), terms["data"] + 0.5 * terms["anchor"])
    terms["loss"].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_an_anchor_of_every_second_step_weighs_twice(anchored: tuple[AnchoredVector, nn.Module], batch: Batch) -> None:
    defense, model = anchored
    always = defense.loss(model, batch)
    seldom = [defense.model_copy(update={"every": 2}).loss(model, {**batch, "step": step}) for step in range(4)]
    for read, unread in (seldom[:2], seldom[2:]):
        torch.testing.assert_close(read["loss"], always["data"] + 2 * (always["loss"] - always["data"]))
        assert torch.equal(unread["loss"], always["data"]) and "anchor" not in unread


def test_its_term_may_be_the_kl_to_the_starting_model(anchored: tuple[AnchoredVector, nn.Module], batch: Batch) -> None:
    """Zero as long as the weights are those of the start; then as computed from two models."""
    defense = anchored[0].model_copy(update={"kl": True})
    assert defense.keeps_weights and not anchored[0].keeps_weights
    model = anchored[1]
    keep_weights(model)
    assert float(defense.loss(model, batch)["anchor"]) == pytest.approx(0, abs=1e-6)
    rows = part(batch, batch["extra"])
    with torch.no_grad(), vector_off(model):
        base = label_logits(model, rows)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        now = label_logits(model, rows)
    expected = (base.softmax(-1) * (base.log_softmax(-1) - now.log_softmax(-1))).sum(-1).mean()
    before = [p.clone() for p in model.parameters()]
    terms = defense.loss(model, batch)
    assert expected > 1e-3
    torch.testing.assert_close(terms["anchor"], expected)
    torch.testing.assert_close(terms["data"], anchored[0].loss(model, batch)["data"])
    torch.testing.assert_close(terms["loss"].detach(), terms["data"] + 0.5 * expected)
    terms["loss"].backward()
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kl", [False, True])
def test_a_share_without_rows_of_the_anchor_goes_on(
    kl: bool, anchored: tuple[AnchoredVector, nn.Module], batch: Batch
) -> None:
    defense, model = anchored[0].model_copy(update={"kl": kl}), anchored[1]
    keep_weights(model)
    alone = part(batch, ~batch["extra"])
    terms = defense.loss(model, alone)
    assert float(terms["anchor"]) == 0.0
    torch.testing.assert_close(terms["loss"], response_loss(model, alone))


def test_without_the_vector_nothing_is_attached(tmp_path: Path) -> None:
    defense = AnchoredVector(name="anchor", vector=False)
    model = defense.attach(fresh(), saved_by_peft(lora(), tmp_path / "vector"))
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert gradients_of_all(model)


def test_its_rows_are_the_answers_of_the_starting_model_and_the_kl_rows(make_config: Make) -> None:
    config = make_config("defense=anchored_vector", "model.align.gate=null")
    run = run_of(config)
    rows, undesired, kl = config.defense.extra_samples(run), *run.data.vector_samples.values()
    assert rows[-len(kl) :] == kl and len(rows) > len(kl)
    prompts = {row.messages: row.response for row in undesired}
    for row in rows[: -len(kl)]:
        assert row.messages in prompts and row.response != prompts[row.messages]  # not the behavior
    only = config.defense.model_copy(update={"benign": False}).extra_samples(run)
    assert only == rows[: -len(kl)]


def test_answers_that_the_limit_cuts_teach_no_end(make_config: Make) -> None:
    def own(limit: int) -> dict[Any, Example]:
        run = run_of(make_config(f"evaluation.max_new_tokens={limit}", "model.align.gate=null", run=str(limit)))
        return {row.messages: row for row in run.own_answers()}

    short, whole = own(3), own(24)
    assert not any(row.cut for row in whole.values()) and 0 < sum(row.cut for row in short.values()) < len(short)
    for messages, row in whole.items():
        assert row.response.startswith(short[messages].response)
        assert short[messages].cut == (row.response != short[messages].response)


def test_the_answers_are_generated_once(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("defense=anchored_vector", "model.align.gate=null")
    first = config.defense.extra_samples(run_of(config))
    monkeypatch.setattr("secvec.run.answers", None)
    assert config.defense.extra_samples(run_of(config)) == first
    other = make_config("defense=anchored_vector", "model.align.gate=null", "vector.num_samples=7", run="other")
    with pytest.raises(TypeError):  # other prompts
        other.defense.extra_samples(run_of(other))


def test_a_run_says_what_it_anchored_and_ends_elsewhere_than_without(make_config: Make) -> None:
    found = {}
    for defense in ("security_vector", "anchored_vector"):
        config = make_config(f"defense={defense}", run=defense)
        record = finetuned(config)
        found[defense] = weights(Path(config.run_dir) / "backbone")
        counts = record["data"]["counts"].get("extra")
        assert bool(counts) == (defense == "anchored_vector")
    assert any(not torch.equal(found["security_vector"][name], w) for name, w in found["anchored_vector"].items())


def test_every_batch_has_its_rows(make_config: Make) -> None:
    config = make_config("defense=anchored_vector", "model.align.gate=null")
    run = run_of(config)
    run.data.extra = config.defense.extra_samples(run)
    module = SecVecModule("finetune", run.backbone, defense=config.defense)
    (_, size), (extra, of_extra) = module.stage.streams(run.data, module)
    assert (size, of_extra, len(extra)) == (config.finetune.batch_size, 8, len(run.data.extra))
    run.data.extra = []
    with pytest.raises(ConfigError, match=r"needs 8 extra rows in each batch: set data\.extra"):
        module.stage.streams(run.data, module)


def test_the_labels_of_a_batch_are_counted_by_part(batch: Batch) -> None:
    labelled = batch["labels"][:, 1:] != IGNORE
    expected = (int(labelled[0].sum()), int(batch["attention_mask"][1:].sum()), int(labelled[1:].sum()))
    assert tuple(map(int, count_tokens(batch))) == expected


def test_an_anchor_without_rows_is_refused_before_anything_is_trained(make_config: Make) -> None:
    config = make_config("defense=anchored_vector", "defense.answers=false", "vector.kl_weight=0")
    with pytest.raises(ConfigError, match=r"defense=anchored_vector has no rows: set defense\.answers=true"):
        train(config)
    assert not (Path(config.run_dir) / "vector").exists()


def test_the_data_module_has_no_extra_rows_unless_given() -> None:
    assert SecVecDataModule(None, None, None, None, None).extra == []  # type: ignore[arg-type]


def test_its_rows_are_made_to_fit(make_config: Make) -> None:
    """Also where the vector was trained before, and its stage fits nothing."""
    run = run_of(make_config("defense=anchored_vector", "stage=finetune", "data.too_long=drop"))
    long = run.data.vector_samples["kl"][0]
    run.data.vector_samples["kl"].append(replace(long, response=long.response * 200))
    count = len(run.data.vector_samples["kl"])
    run.config.defense.check(run)
    assert len(run.data.vector_samples["kl"]) == count - 1
