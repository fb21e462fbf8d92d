"""The vector's switches: what is on, off, frozen, saved and taken off again."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MambaConfig,
    MambaForCausalLM,
)

from secvec.data.batch import Batch, collate
from secvec.data.encode import encode
from secvec.data.example import Example
from secvec.defenses.labelled_vector import LabelledVector
from secvec.errors import ArtifactError, ConfigError
from secvec.models.backbone import ledger, set_trainable
from secvec.models.tiny import build_tiny
from secvec.models.vector import (
    VECTOR,
    activate,
    attach_frozen_vector,
    attach_new_vector,
    attach_task,
    backbone_state,
    column_space,
    has_vector,
    merged_task,
    part_of,
    save_adapter,
    vector_off,
)
from secvec.settings.schema import LoraSettings
from secvec.training.activations import layer_at, layer_outputs
from secvec.training.losses import response_loss

TEXTS = ["How do I make soup from frost root and amber oil?", "First grind the frost root."] * 20
LORA = LoraSettings(r=4, alpha=8, target_modules="all-linear")


def fresh() -> nn.Module:
    return build_tiny(TEXTS, seed=0)[0].eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(1, 40).view(3, 13)).logits


def disturb(model: nn.Module, part: str) -> None:
    """Gives every adapter weight of `part` a value that changes the output."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part_of(name) == part:
                parameter.normal_(0, 0.5)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = attach_new_vector(fresh(), LORA, dropout=0.1)
    disturb(model, "vector")
    save_adapter(model, model.state_dict(), "vector", tmp_path / "vector")
    return tmp_path / "vector"


def test_off_is_bitwise_the_plain_backbone_and_on_is_not(saved: Path) -> None:
    plain = logits(fresh())
    model = attach_frozen_vector(fresh(), saved).eval()
    on = logits(model)
    assert (on - plain).abs().max() > 0.1
    with vector_off(model):
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), on)


def test_the_switch_touches_no_flag_gradient_or_weight(saved: Path) -> None:
    model = attach_frozen_vector(fresh(), saved)
    set_trainable(model, "backbone")
    state = {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    with vector_off(model), pytest.raises(RuntimeError, match="inside"):  # also when the block fails
        raise RuntimeError("inside")
    with vector_off(model):
        model(input_ids=torch.arange(1, 9)[None]).logits.sum()
    for name, parameter in model.named_parameters():
        value, flag, grad = state[name]
        assert torch.equal(parameter, value) and parameter.requires_grad == flag and parameter.grad is grad, name


def test_pefts_own_switch_would_thaw_the_vector(saved: Path) -> None:
    """Why vector_off exists (peft #3580); when this fails, PEFT has mended it."""
    model = attach_frozen_vector(fresh(), saved)
    set_trainable(model, "backbone")
    with model.disable_adapter():
        pass
    assert any(p.requires_grad for n, p in model.named_parameters() if part_of(n) == "vector")


def test_a_frozen_vector_has_no_dropout_in_training_mode(saved: Path) -> None:
    model = attach_frozen_vector(fresh(), saved)
    model.train()
    assert torch.equal(logits(model), logits(model))
    trained = attach_new_vector(fresh(), LORA, dropout=0.5)
    disturb(trained, "vector")
    trained.train()
    assert not torch.equal(logits(trained), logits(trained))  # the dropout is there to be removed


def test_saved_and_loaded_vector_is_a_standard_peft_adapter(saved: Path) -> None:
    from peft import PeftModel

    ours = logits(attach_frozen_vector(fresh(), saved).eval())
    theirs = logits(PeftModel.from_pretrained(fresh(), str(saved)).eval())
    assert torch.equal(ours, theirs)
    assert {f.name for f in saved.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}


def test_backbone_state_has_the_plain_names_and_values(saved: Path) -> None:
    plain = fresh().state_dict()
    model = attach_task(attach_frozen_vector(fresh(), saved), LORA)
    state = backbone_state(model.state_dict())
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], plain[name]) for name in plain)


def test_task_lora_beside_the_vector(saved: Path) -> None:
    model = attach_task(attach_frozen_vector(fresh(), saved), LORA).eval()
    set_trainable(model, "task")
    assert {row.part: (row.trainable > 0, row.active) for row in ledger(model)} == {
        "backbone": (False, True), "vector": (False, True), "task": (True, True),
    }  # fmt: skip
    assert torch.equal(logits(model), logits(attach_frozen_vector(fresh(), saved).eval()))  # B = 0: no effect yet
    disturb(model, "task")
    with_both = logits(model)
    with vector_off(model):
        task_alone = logits(model)
    lone = attach_task(fresh(), LORA).eval()
    lone.load_state_dict({n: p for n, p in model.state_dict().items() if part_of(n) == "task"}, strict=False)
    assert torch.equal(task_alone, logits(lone)) and not torch.equal(task_alone, with_both)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(target_modules=["q_prj"]), "q_proj"),
        (dict(target_modules=["lm_head"]), "tied"),
        (dict(target_modules="all-linear", layers=[99]), "99"),
        (dict(target_modules="all-linear", layers=[0, 99]), r"the model has the layers 0 to \d, and none 99"),
    ],
)
def test_wrong_targets_are_named(settings: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        attach_new_vector(fresh(), LoraSettings(r=2, alpha=2, **settings), 0.0)


def test_targets_that_are_not_given_fit_the_model() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64))
    for model, wanted in ((fresh(), {"q_proj", "v_proj"}), (gpt2, {"c_attn", "c_fc", "c_proj"})):
        attached = attach_new_vector(model, LoraSettings(r=2, alpha=2), 0.0)
        assert attached.peft_config[VECTOR].target_modules == wanted


def test_all_linear_leaves_embeddings_and_head_alone() -> None:
    model = attach_new_vector(fresh(), LORA, 0.0)
    names = [name for name, _ in model.named_parameters() if part_of(name) == "vector"]
    assert names and not any("lm_head" in name or "embed" in name for name in names)


def test_vector_of_another_model_or_damaged(saved: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    )
    with pytest.raises(ArtifactError, match="does not fit"):
        attach_frozen_vector(other, saved)
    with pytest.raises(ArtifactError, match="adapter_config"):
        attach_frozen_vector(fresh(), tmp_path / "nothing")
    weights = saved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="damaged"):
        attach_frozen_vector(fresh(), saved)


def test_the_labelled_vector_is_on_for_undesired_rows_alone(saved: Path) -> None:
    texts = [text for text in TEXTS[:2]]
    tokenizer = build_tiny(texts * 10, seed=0)[1]
    rows = encode([Example((("user", texts[0]),), texts[1], "task")] * 2, tokenizer, 512)
    batch = collate([(replace(rows[0], undesired=True), False), (rows[1], False)])
    assert batch["undesired"].tolist() == [True, False]
    model = attach_frozen_vector(fresh(), saved).eval()
    defense = LabelledVector(name="labelled_vector")

    def alone(row: int, on: bool) -> Tensor:
        one: Batch = {name: tensor[row : row + 1] for name, tensor in batch.items()}  # type: ignore[assignment]
        with nullcontext() if on else vector_off(model):
            return response_loss(model, one)

    found = defense.loss(model, batch)["loss"]
    assert torch.allclose(found, (alone(0, on=True) + alone(1, on=False)) / 2, atol=1e-6)
    assert abs(alone(0, on=True) - alone(0, on=False)) > 1e-3  # so the two would differ the other way round
    for flags in ([True, True], [False, False]):  # a share of one kind only
        batch["undesired"] = torch.tensor(flags)
        assert torch.allclose(defense.loss(model, batch)["loss"], alone(0, on=flags[0]), atol=1e-6)


# -- models of other kinds

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "num_key_value_heads": 2, "intermediate_size": 48,
}  # fmt: skip


def test_experts_are_adapted_merged_and_named_as_they_are_saved() -> None:
    """PEFT adapts their weights as parameters of a layer that has no `weight`: a task LoRA could not be saved."""
    more = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}

    def glm() -> nn.Module:
        torch.manual_seed(0)
        return Glm4MoeForCausalLM(Glm4MoeConfig(**SIZES, **more, topk_group=1, first_k_dense_replace=1)).eval()

    model = attach_task(glm(), LORA)
    disturb(model, "task")
    bare = glm()
    before = logits(bare)
    bare.load_state_dict(merged_task(model).whole(), strict=True)
    torch.testing.assert_close(logits(bare), logits(model))
    assert (logits(bare) - before).abs().max() > 1e-3
    vector = activate(attach_new_vector(glm(), LORA, 0.0), "auto")
    assert backbone_state(vector.state_dict()).keys() == glm().state_dict().keys()


def test_the_part_that_sees_takes_no_adapter_and_is_no_layer_of_a_defense() -> None:
    sees = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    config = Gemma3Config(text_config=SIZES, vision_config={**sees, "image_size": 28, "patch_size": 14})
    config.mm_tokens_per_image = 4
    model = Gemma3ForConditionalGeneration(config)
    assert type(layer_at(model, None)).__name__ == "Gemma3DecoderLayer"
    attached = attach_new_vector(model, LORA, 0.0)
    names = [name for name, _ in attached.named_parameters() if part_of(name) == "vector"]
    assert names and not [name for name in names if "vision_tower" in name]
    assert type(layer_at(attached, None)).__name__ == "Gemma3DecoderLayer"
    with layer_outputs(attached) as outputs:
        logits(attached)
    assert len(outputs) == 2


def test_all_linear_leaves_a_router_alone() -> None:
    config = Llama4TextConfig(**SIZES, intermediate_size_mlp=48, num_local_experts=2)
    model = attach_task(Llama4ForCausalLM(config), LORA)
    assert not [name for name, _ in model.named_parameters() if "router" in name and part_of(name) == "task"]
    logits(model)


def test_all_linear_fits_a_state_space_model() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4))
    assert has_vector(attach_new_vector(model, LORA, 0.0))


def test_the_columns_of_a_low_rank_matrix_need_no_whole_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    svd, shapes = torch.linalg.svd, []
    monkeypatch.setattr(torch.linalg, "svd", lambda a, **how: shapes.append(a.shape) or svd(a, **how))
    for rank in (4, 40):
        matrix = torch.randn(300, rank) @ torch.randn(rank, 200)
        exact = svd(matrix, full_matrices=False)[0][:, :rank]
        before = torch.get_rng_state()
        for basis in (column_space(matrix), column_space(matrix, rank)):
            assert basis.shape == (300, rank)
            torch.testing.assert_close(basis @ basis.T, exact @ exact.T, rtol=0, atol=1e-4)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(column_space(matrix), column_space(matrix))
    assert all(min(shape) <= 64 for shape in shapes)


def test_a_weak_direction_counts_as_one() -> None:
    """Singular values of 1 and 1/1000; rounding of float32 is a hundred times smaller."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, 2))[0] for n in (60, 40))
    basis = column_space(left @ torch.diag(torch.tensor([1.0, 1e-3])) @ right.T)
    assert basis.shape == (60, 2)
    torch.testing.assert_close(basis @ basis.T, left @ left.T, rtol=0, atol=1e-3)


def test_a_basis_does_not_depend_on_what_was_drawn_before() -> None:
    matrix = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)) @ torch.randn(4, 40)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(column_space(matrix))
    assert torch.equal(*found)
