"""Each defense of the bench computes what its source says, on numbers worked out by hand, and changes something."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, run_of
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secvec.config.schema import RunConfig
from secvec.data.batch import IGNORE, Batch, Encoded, collate, count_together
from secvec.defenses.base import Defense
from secvec.defenses.booster import Attenuated
from secvec.defenses.buffer_and_reinforce import BufferAndReinforce, outside
from secvec.defenses.caft import Caft
from secvec.defenses.kl_to_base import KlToBase
from secvec.defenses.l2_to_base import L2ToBase
from secvec.defenses.lisa import Lisa
from secvec.defenses.negated_vector import NegatedVector
from secvec.defenses.persona_steering import PersonaSteering
from secvec.defenses.random_adapter import RandomAdapter
from secvec.defenses.repnoise import Noised, mmd
from secvec.defenses.safe_lora import SafeLora
from secvec.defenses.safegrad import SafeGrad
from secvec.defenses.vaccine import Perturbed
from secvec.errors import ConfigError, GateError
from secvec.models.kept import keep_weights
from secvec.models.packing import PACKED, enable_packing
from secvec.models.vector import _lora_layers, attach_frozen_vector, randomize_vector, vector_deltas
from secvec.run import train
from secvec.training.activations import change_outputs, each_output, layer_at, layer_outputs, mean_outputs
from secvec.training.losses import extra_divergence, response_loss
from tests.contracts.test_defense_hooks import fit, make_batch, trained
from tests.contracts.test_foreign_adapters import lora, saved_by_peft
from tests.contracts.test_stages import same, weights
from tests.contracts.test_vector import fresh, logits

Make = Callable[..., RunConfig]
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    return saved_by_peft(lora(), tmp_path / "vector")


class Loads:
    """A backbone that is in no folder."""

    def load(self) -> nn.Module:
        return fresh()


def products(model: nn.Module) -> list[Tensor]:
    """B A of each layer."""
    pairs = ((layer.lora_B["security_vector"], layer.lora_A["security_vector"]) for layer in _lora_layers(model))
    return [(b.weight @ a.weight).detach() for b, a in pairs]


def test_random_adapter_has_the_norm_of_the_vector_and_its_own_direction(vector: Path) -> None:

    def of_seed(seed: int) -> list[Tensor]:
        model = fresh()
        torch.manual_seed(seed)  # as a training does before it builds its model
        return products(RandomAdapter(name="random_adapter").attach(model, vector))

    drawn = of_seed(5)
    theirs = products(attach_frozen_vector(fresh(), vector))
    assert len(drawn) == len(theirs) > 1
    for ours, other in zip(drawn, theirs, strict=True):
        assert float(torch.linalg.norm(ours)) == pytest.approx(float(torch.linalg.norm(other)), rel=1e-5)
        assert abs(float(torch.cosine_similarity(ours.flatten(), other.flatten(), 0))) < 0.3
    assert all(map(torch.equal, drawn, of_seed(5))) and not torch.equal(drawn[0], of_seed(6)[0])


def test_random_adapter_is_active_as_the_vector_is(vector: Path) -> None:
    defense = RandomAdapter(name="random_adapter")
    found = []
    for kind in ("merged", "adapter"):
        model = fresh()
        torch.manual_seed(5)
        found.append(defense.model_copy(update={"activation": kind}).attach(model, vector))
    random, beside = found
    torch.testing.assert_close(logits(random), logits(beside))
    assert (logits(random) - logits(fresh())).abs().max() > 0.01


def test_random_adapter_is_scaled_by_hand(vector: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws of ones: B A is 2 everywhere (r = 2), its norm 2 sqrt(mn). A and B become sqrt(norm / (2 sqrt(mn)))."""
    monkeypatch.setattr(torch, "randn", lambda shape, generator: torch.ones(shape))
    model = attach_frozen_vector(fresh(), vector)
    before = products(model)[0]
    randomize_vector(model, torch.Generator())
    layer = _lora_layers(model)[0]
    wanted = (float(torch.linalg.norm(before)) / (2 * before.numel() ** 0.5)) ** 0.5
    for part in (layer.lora_A, layer.lora_B):
        torch.testing.assert_close(
            part["security_vector"].weight, torch.full_like(part["security_vector"].weight, wanted)
        )


@pytest.mark.parametrize("config", [lora(use_dora=True), lora(lora_bias=True)], ids=["dora", "lora_bias"])
def test_a_vector_that_is_no_delta_is_refused(config: Any, tmp_path: Path) -> None:
    folder = saved_by_peft(config, tmp_path / "more")
    for use in (
        lambda: RandomAdapter(name="r", activation="adapter").attach(fresh(), folder),
        lambda: vector_deltas(fresh(), folder),
    ):
        with pytest.raises(ConfigError, match="takes a vector that is a low-rank delta of linear layers"):
            use()


def test_negated_vector_takes_the_delta_off(vector: Path) -> None:
    """W - 0.5 s B A, with s = alpha / r = 2."""
    saved = load_file(vector / "adapter_model.safetensors")
    name = f"base_model.model.{Q.removesuffix('.weight')}"
    delta = 2 * saved[f"{name}.lora_B.weight"] @ saved[f"{name}.lora_A.weight"]
    start = {name: weight.clone() for name, weight in fresh().state_dict().items()}
    found = NegatedVector(name="negated_vector", scale=0.5).finish(dict(start), Loads(), vector)  # type: ignore[arg-type]
    torch.testing.assert_close(found[Q], start[Q] - 0.5 * delta)
    assert delta.abs().max() > 0.01
    changed = {name for name in start if not torch.equal(found[name], start[name])}
    assert changed == {n for n in start if "q_proj.weight" in n or "v_proj.weight" in n}
    assert found.keys() == start.keys()


def test_negated_vector_undoes_a_merge(vector: Path) -> None:
    """The model with the vector, and the delta taken off its merged weights, is the bare model."""
    start = fresh().state_dict()
    deltas = vector_deltas(fresh(), vector)
    merged = {name: weight + deltas.get(name, 0) for name, weight in start.items()}
    found = NegatedVector(name="negated_vector").finish(merged, Loads(), vector)  # type: ignore[arg-type]
    for name, weight in start.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "conf" / "defense").glob("*.yaml")))
def test_the_docs_list_each_defense_with_its_needs(make_config: Make, name: str) -> None:
    defense = make_config(f"defense={name}").defense
    rows = [line.split(" | ") for line in (ROOT / "docs" / "defenses.md").read_text().splitlines()]
    (row,) = [row for row in rows if row[0] == f"| `{name}`"]
    assert row[3] == (", ".join(defense.needs) or "–")
    assert defense.name == name and (not defense.uses_vector or "undesired samples" in defense.needs)


def two_words(weight: float) -> nn.Module:
    """A model of one number: its logits are (w, 0) after every token."""

    class TwoWords(nn.Module):
        config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(_attn_implementation="eager"))

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 2, bias=False)
            self.head.weight.data = torch.tensor([[weight], [0.0]])

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, input_ids: Tensor, **_: Any) -> Any:
            return SimpleNamespace(logits=self.head(torch.ones(*input_ids.shape, 1)))

    return TwoWords()


def words(*answers: list[int], extra: int = 0) -> Batch:
    """A prompt of one token, and answers of the words 0 and 1; the last `extra` rows are extra ones."""
    rows = [(Encoded([0, *answer], 1), number >= len(answers) - extra) for number, answer in enumerate(answers)]
    return collate(rows)


def sigmoid(w: float) -> float:
    return 1 / (1 + math.exp(-w))


def test_kl_to_base_by_hand() -> None:
    """Base p = (1/2, 1/2), model q = (3/4, 1/4): KL = 1/2 ln(2/3) + 1/2 ln 2 = 1/2 ln(4/3)."""
    model = two_words(0.0)
    keep_weights(model)
    with torch.no_grad():
        model.head.weight[0, 0] = math.log(3)
    terms = KlToBase(name="kl_to_base", weight=0.7).loss(model, words([0], [1, 0]))
    assert float(terms["kl"]) == pytest.approx(0.5 * math.log(4 / 3), rel=1e-5)
    nll = -(2 * math.log(3 / 4) + math.log(1 / 4)) / 3
    assert float(terms["data"]) == pytest.approx(nll, rel=1e-5)
    assert float(terms["loss"]) == pytest.approx(nll + 0.35 * math.log(4 / 3), rel=1e-5)
    terms["loss"].backward()  # d nll / dw = q - share of word 0, d kl / dw = q - p
    assert float(model.head.weight.grad[0, 0]) == pytest.approx((3 / 4 - 2 / 3) + 0.7 * (3 / 4 - 1 / 2), rel=1e-4)
    assert torch.equal(model.kept[0], torch.zeros(2, 1))


def test_l2_to_base_by_hand() -> None:
    """theta - theta_0 = (3, 4): distance 5, gradient 2 x 0.1 x (3, 4) beside that of the loss."""
    model = two_words(1.0)
    keep_weights(model)
    with torch.no_grad():
        model.head.weight += torch.tensor([[3.0], [4.0]])
    model.head.weight.grad = torch.tensor([[1.0], [-1.0]])
    logged = L2ToBase(name="l2_to_base", weight=0.1).gradients(model, [])
    assert float(logged["distance"]) == pytest.approx(5)
    torch.testing.assert_close(model.head.weight.grad, torch.tensor([[1.6], [-0.2]]))


def test_safe_samples_are_the_share_that_is_asked_for(make_config: Make) -> None:
    """32 rows and 8 more: a fifth of 40. 16 prompts have answers enough; a third of the rows repeats none."""
    config = make_config("defense=safe_samples", "defense.share=0.2")
    run = run_of(config)
    config.defense.check(run)
    before = run.data.mixtures[0]
    answers = run.own_answers()
    after = config.defense.training_samples(run, before)
    added = after["benign"][len(before["benign"]) :]
    assert len(added) == 8 and after["undesired"] == before["undesired"]
    assert [(row.messages, row.response) for row in added] == [(row.messages, row.response) for row in answers[:8]]
    assert {row.kind for row in added} == {"ordinary"}
    many = config.defense.model_copy(update={"share": 0.75}).training_samples(run, before)
    assert len(many["benign"]) - len(before["benign"]) == 96 > len(answers)


def test_the_vectors_samples_count_for_a_run_that_uses_them(make_config: Make) -> None:
    keys = {
        (name, r): make_config(f"defense={name}", f"vector.num_samples={r}").key
        for name in ("none", "safe_samples")
        for r in (20, 21)
    }
    assert keys["none", 20] == keys["none", 21] and keys["safe_samples", 20] != keys["safe_samples", 21]
    assert make_config("defense=safe_samples").stages == ("finetune", "infer")


ON_THE_STEP = [
    KlToBase(name="kl_to_base"),
    L2ToBase(name="l2_to_base", weight=1.0),
    SafeGrad(name="safegrad"),
    Lisa(name="lisa", safe_steps=1, data_steps=3),
    Attenuated(name="booster", weight=0.2, step=0.1, extra_batch_size=1),
]


@pytest.mark.parametrize("defense", ON_THE_STEP, ids=lambda defense: defense.name)
def test_a_training_ends_elsewhere_than_the_plain_one(defense: Defense) -> None:
    """By more than rounding, and by less than all of what is learned."""
    ends = [trained(fit(one, epochs=4, lr=0.01)) for one in (Defense(name="none"), defense)]
    start = torch.cat([p.detach().flatten() for p in fresh().parameters()])
    plain, defended = (torch.cat([weight.flatten() for weight in end]) for end in ends)
    moved = float((plain - start).norm())
    assert 1e-2 * moved < float((plain - defended).norm()) < moved


@pytest.mark.parametrize("defense", ON_THE_STEP, ids=lambda defense: defense.name)
def test_small_batches_accumulated_are_one_large_batch(defense: Defense) -> None:
    texts = ["First grind the frost root.", "oil", "amber oil", "make soup from frost root"]
    extra = int(defense.extra_batch_size > 0)
    small = [make_batch(*texts[:2], extra=extra), make_batch(*texts[2:], extra=extra)]
    count_together(small)
    large = [make_batch(texts[0], texts[2], texts[1], texts[3], extra=2 * extra)]
    ours, theirs = (
        trained(fit(defense, epochs=3, batches=batches, precision="64-true", accumulate_grad_batches=len(batches)))
        for batches in (small, large)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("data", "safe", "expected"),
    [
        ([3.0, -1.0], [0.0, 2.0], [3.0, 1.0]),  # g.s = -2, |s|^2 = 4: g + s/2 = (3, 0), and half of s
        ([3.0, 1.0], [0.0, 2.0], [3.0, 2.0]),  # no conflict
        ([3.0, -1.0], [0.0, 0.0], [3.0, -1.0]),  # nothing to hold yet
    ],
    ids=["conflict", "agreement", "first step"],
)
def test_safegrad_by_hand(
    data: list[float], safe: list[float], expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = two_words(1.0)
    model.head.weight.grad = torch.tensor(data)[:, None]
    given = torch.tensor(safe)[:, None]
    monkeypatch.setattr(
        "secvec.training.losses.extra_divergence", lambda model, batch: (model.head.weight * given).sum()
    )
    logged = SafeGrad(name="safegrad", weight=0.5).gradients(model, [words([0])])
    torch.testing.assert_close(model.head.weight.grad[:, 0], torch.tensor(expected))
    dot = sum(a * b for a, b in zip(data, safe, strict=True))
    assert float(logged["cosine"]) == pytest.approx(dot / 10**0.5 / 2)


def test_safegrads_alignment_loss_is_the_kl_on_the_safe_samples() -> None:
    """As in `test_kl_to_base_by_hand`, on the last row alone; the loss is that of the others."""
    model = two_words(0.0)
    keep_weights(model)
    with torch.no_grad():
        model.head.weight[0, 0] = math.log(3)
    batch, defense = words([1, 1, 1], [0], extra=1), SafeGrad(name="safegrad")
    assert float(extra_divergence(model, batch).detach()) == pytest.approx(0.5 * math.log(4 / 3), rel=1e-5)
    assert float(defense.loss(model, batch)["loss"].detach()) == pytest.approx(math.log(4), rel=1e-5)


def test_lisa_by_hand() -> None:
    """One safe step, two on the data, rate 0.1, rho 2. d/dw of -ln q(1) is q(0), of -ln q(0) it is q(0) - 1."""
    model, defense, rate, rho = two_words(0.0), Lisa(name="lisa", safe_steps=1, data_steps=2, rho=2.0), 0.1, 2.0
    keep_weights(model)
    w, kept = 0.0, 0.0
    for step in range(7):
        batch = words([1], [0], extra=1)  # the data say 1, the safe sample says 0
        batch["step"] = step
        model.zero_grad()
        defense.loss(model, batch)["loss"].backward()
        model.head.weight.grad[1] = 0  # the other word stays
        defense.gradients(model, [batch])
        safe = step % 3 == 0
        kept = w if step % 3 in (0, 1) else kept
        w -= rate * (sigmoid(w) - safe + rho * (w - kept))
        with torch.no_grad():
            model.head.weight -= rate * model.head.weight.grad
        assert float(model.head.weight[0, 0].detach()) == pytest.approx(w, rel=1e-5)
    assert w != 0


def test_lisa_goes_on_where_it_was(tmp_path: Path) -> None:
    """A turn that a checkpoint cuts in two is held near the same weights after it."""
    lisa = Lisa(name="lisa", safe_steps=2, data_steps=5, rho=3.0)
    whole, half = fit(lisa, epochs=4, lr=0.01), fit(lisa, epochs=2, lr=0.01)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    on = fit(lisa, epochs=4, lr=0.01, resume=tmp_path / "half.ckpt")
    assert all(map(torch.equal, trained(whole), trained(on)))
    other = fit(lisa.model_copy(update={"rho": 0.0}), epochs=4, lr=0.01)
    assert not all(map(torch.equal, trained(whole), trained(other)))


NEW = ["random_adapter", "negated_vector", "kl_to_base", "l2_to_base", "safe_samples", "safegrad", "lisa", "safe_lora"]
NEW += ["persona_steering", "caft", "vaccine", "booster", "repnoise", "buffer_and_reinforce"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_a_whole_run_ends_elsewhere_than_the_plain_one(make_config: Make, name: str) -> None:
    saved = {}
    tune = "tune=lora" if name == "buffer_and_reinforce" else "tune=full"
    for defense in ("none", name):
        config = make_config(f"defense={defense}", tune, "trainer.gradient_clip_val=1.0", run=defense)
        record = train(config)
        assert record["status"] == "completed"
        saved[defense] = weights(Path(config.run_dir) / "backbone")
    assert saved["none"].keys() == saved[name].keys() and not same(saved["none"], saved[name])


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.7, [[3.0, 3.0], [0.0, 0.0]]), (0.5, [[3.0, 3.0], [4.0, -4.0]])],
    ids=["below", "above"],
)
def test_safe_lora_by_hand(threshold: float, expected: list[list[float]]) -> None:
    """V = (1, 0)^T (2, 5): C keeps the first row. |C dW| / |dW| = sqrt(18 / 50) = .6, which is the cosine."""
    update, direction = torch.tensor([[3.0, 3.0], [4.0, -4.0]]), torch.tensor([[2.0, 5.0], [0.0, 0.0]])
    found = SafeLora(name="safe_lora", threshold=threshold).projected(update, direction)
    torch.testing.assert_close(found, torch.tensor(expected))


def test_safe_lora_leaves_the_start_and_what_has_no_delta(vector: Path) -> None:
    """Of an update in all weights, that of the vector's layers alone changes: to one of the rank of the vector, 2."""
    start = {name: weight.clone() for name, weight in fresh().state_dict().items()}
    torch.manual_seed(3)
    after = {name: weight + 0.01 * torch.randn_like(weight) for name, weight in start.items()}
    defense = SafeLora(name="safe_lora")
    found = defense.finish(dict(after), Loads(), vector)  # type: ignore[arg-type]
    assert {n for n in start if not torch.equal(found[n], after[n])} == set(vector_deltas(fresh(), vector))
    assert int(torch.linalg.matrix_rank(found[Q] - start[Q], atol=1e-4)) == 2
    same_again = defense.finish(dict(start), Loads(), vector)  # type: ignore[arg-type]
    assert all(torch.equal(same_again[name], start[name]) for name in start)


UNDESIRED, OWN = torch.tensor([[3.0, 1.0], [5.0, 1.0]]), torch.tensor([[0.0, 1.0], [2.0, 1.0]])


def test_persona_steering_by_hand() -> None:
    """Means (4, 1) and (1, 1): v = (3, 0), half of it is added."""
    defense = PersonaSteering(name="persona_steering", coefficient=0.5)
    persona = defense.trait(UNDESIRED, OWN)
    torch.testing.assert_close(persona, torch.tensor([3.0, 0.0]))
    torch.testing.assert_close(defense.changed(torch.ones(1, 2, 2), persona), torch.tensor([[[2.5, 1.0]] * 2]))


def test_caft_by_hand() -> None:
    """Differences (3, 4) and (6, 8): U = (.6, .8). Of h = (1, 2) the part 2.2 U = (1.32, 1.76) goes."""
    defense = Caft(name="caft")
    subspace = defense.trait(torch.tensor([[3.0, 4.0], [6.0, 8.0]]), torch.zeros(2, 2))
    torch.testing.assert_close(subspace.abs(), torch.tensor([[0.6, 0.8]]))
    hidden = torch.tensor([[[1.0, 2.0]]], requires_grad=True)
    found = defense.changed(hidden, subspace)
    torch.testing.assert_close(found.detach(), torch.tensor([[[-0.32, 0.24]]]))
    found[..., 0].sum().backward()  # no gradient along U either
    assert float((hidden.grad * subspace).sum()) == pytest.approx(0, abs=1e-6)  # type: ignore[operator]


def test_mean_outputs_are_those_of_the_answers() -> None:
    model, batch = fresh(), make_batch("oil", "First grind the frost root.")
    seen: list[Tensor] = []
    handle = layer_at(model, None).register_forward_hook(lambda *given: seen.append(given[2]))
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    handle.remove()
    expected = torch.stack([h[label != IGNORE].mean(0) for h, label in zip(seen[0], batch["labels"], strict=True)])
    torch.testing.assert_close(mean_outputs(model, None, [batch]), expected.detach())
    assert layer_at(model, None) is model.model.layers[len(model.model.layers) // 2]
    with pytest.raises(ConfigError, match=r"defense\.layer=99: the model has \d+ layers"):
        layer_at(model, 99)


def test_outputs_are_changed_in_training_alone_and_nothing_of_it_is_saved() -> None:
    model, plain = fresh(), fresh()
    change_outputs(model, 0, torch.full((128,), 0.5), lambda hidden, directions: hidden + directions)
    assert torch.equal(logits(model.eval()), logits(plain))
    assert (logits(model.train()) - logits(plain)).abs().max() > 0.01
    assert model.state_dict().keys() == plain.state_dict().keys()


def test_the_activations_are_read_once(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(make_config("defense=caft"))
    path = run.config.defense.prepared(run).activations
    monkeypatch.setattr("secvec.run.mean_outputs", None)
    assert run.config.defense.prepared(run).activations == path
    found = load_file(path)
    assert found["undesired"].shape == found["own"].shape and not torch.equal(found["undesired"], found["own"])
    with pytest.raises(ConfigError, match="layers, counted from 0"):
        Caft(name="caft", layer=99).check(run)


class OneLayer(nn.Module):
    """A model with one layer: its output is w after every token, and the logits are (w, 0)."""

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(_attn_implementation="eager"))

    def __init__(self, weight: float) -> None:
        super().__init__()

        class OnlyLayer(nn.Linear):
            pass

        self.layers = nn.ModuleList([OnlyLayer(1, 1, bias=False)])
        self.layers[0].weight.data = torch.tensor([[weight]])
        self.head = nn.Linear(1, 2, bias=False)
        self.head.weight.data = torch.tensor([[1.0], [0.0]])

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.head(self.layers[0](torch.ones(*input_ids.shape, 1))))


@pytest.mark.parametrize("answer", [[0], [0, 0], [0, 0, 0]], ids=len)
def test_vaccine_by_hand(answer: list[int]) -> None:
    """-ln q(0) falls with w, equally at each of n tokens: d = -rho / sqrt(n) there. d/dw of -ln q(0) is q(0) - 1."""
    model, w, rho = OneLayer(0.4), 0.4, 0.6
    terms = Perturbed(name="vaccine", rho=rho).loss(model, words(answer))
    moved = w - rho / len(answer) ** 0.5
    assert float(terms["unperturbed"]) == pytest.approx(-math.log(sigmoid(w)), rel=1e-5)
    assert float(terms["loss"].detach()) == pytest.approx(-math.log(sigmoid(moved)), rel=1e-5)
    terms["loss"].backward()  # the perturbation is a constant
    assert float(model.layers[0].weight.grad) == pytest.approx(sigmoid(moved) - 1, rel=1e-5)  # type: ignore[arg-type]


def test_booster_by_hand() -> None:
    """h = -ln q(1) has the gradient q(0) (1, -1): a step that way moves the difference of logits by sqrt(2) steps."""
    model, w, weight, step = two_words(0.3), 0.3, 5.0, 0.2
    batch, defense = words([0], [1], extra=1), Attenuated(name="booster", weight=weight, step=step)
    assert float(defense.loss(model, batch)["loss"].detach()) == pytest.approx(-math.log(sigmoid(w)), rel=1e-5)
    model.head.weight.grad = torch.tensor([[1.0], [2.0]])
    logged = defense.gradients(model, [batch])
    gain = weight * (sigmoid(w) - sigmoid(w - step * 2**0.5))
    torch.testing.assert_close(model.head.weight.grad, torch.tensor([[1.0 + gain], [2.0 - gain]]))
    assert float(logged["undesired_norm"]) == pytest.approx(2**0.5 * sigmoid(w), rel=1e-5)
    assert torch.equal(model.head.weight.detach(), torch.tensor([[0.3], [0.0]]))


def test_the_distance_of_repnoise_by_hand() -> None:
    """0 and 2: of all ordered pairs the mean squared distance is 4, so the kernels are exp(-1/4) to exp(-4)."""
    kernels = sum(math.exp(-(2.0**power)) for power in range(-2, 3))
    assert float(mmd(torch.tensor([[0.0]]), torch.tensor([[2.0]]))) == pytest.approx(10 - 2 * kernels, rel=1e-5)
    torch.manual_seed(0)
    near, far = torch.randn(60, 3), torch.randn(60, 3) + 2
    assert float(mmd(near, torch.randn(60, 3))) < 0.2 < float(mmd(near, far))


def test_repnoise_by_hand() -> None:
    """The safe row says 0, the undesired one 1; its state at the one response token is w."""
    w, batch = 0.3, words([0], [1], extra=1)
    given = {"noise": 0.5, "ascent": 2.0}
    model = OneLayer(w)
    terms = Noised(name="repnoise", **given).loss(model, batch)
    drawn = torch.randn(1, 1, generator=torch.Generator().manual_seed(0))
    distance = float(mmd(torch.tensor([[w]]), drawn))
    safe, undesired = -math.log(sigmoid(w)), -math.log(1 - sigmoid(w))
    expected = {"stability": safe, "undesired": undesired, "mmd": distance}
    expected["loss"] = safe + 0.5 * distance - 2 * math.log(1 + undesired)
    assert {name: float(term.detach()) for name, term in terms.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["vaccine", "booster", "repnoise"])
def test_the_starting_model_is_trained_once_more(make_config: Make, name: str) -> None:
    """Other weights, made once; the model that they are compared with stays that of the run."""
    config = make_config(f"defense={name}", "defense.epochs=1", "defense.batch_size=8")
    run = run_of(config)
    config.defense.check(run)
    start = config.defense.starting(run)
    assert not same(weights(start.folder), weights(run.backbone.folder))
    again = run_of(config)
    assert config.defense.starting(again).folder == start.folder
    other = make_config(f"defense={name}", "defense.epochs=1", "defense.batch_size=6")
    assert other.defense.starting(run_of(other)).folder != start.folder


def test_what_is_merged_lies_outside_the_task_lora_by_hand() -> None:
    update, other = torch.tensor([[2.0, 5.0], [0.0, 0.0]]), torch.tensor([[3.0, 3.0], [4.0, -4.0]])
    torch.testing.assert_close(outside(update, other, 1), torch.tensor([[0.0, 0.0], [4.0, -4.0]]))
    assert torch.equal(outside(torch.zeros(2, 2), other, 1), other)


def test_buffer_and_reinforce_merges_what_the_task_lora_does_not_write_to(vector: Path) -> None:
    start = {name: weight.clone() for name, weight in fresh().state_dict().items()}
    torch.manual_seed(3)
    task = torch.randn(start[Q].shape[0], 2) @ torch.randn(2, start[Q].shape[1])
    defense = BufferAndReinforce(name="b", lr=1.0, weight=0.5, reinforce=vector, rank=2)
    found = defense.finish(start | {Q: start[Q] + task}, Loads(), None)  # type: ignore[arg-type]
    merged, delta = found[Q] - start[Q] - task, vector_deltas(fresh(), vector)[Q]
    assert float((task.T @ merged).abs().max()) < 1e-4 * float(task.norm())
    basis = torch.linalg.qr(task)[0][:, :2]
    torch.testing.assert_close(merged, 0.5 * (delta - basis @ basis.T @ delta), rtol=0, atol=1e-5)
    assert merged.abs().max() > 0.01 and found.keys() == start.keys()


def test_a_weight_that_stands_the_other_way_round_is_merged_as_others_are(vector: Path, monkeypatch: Any) -> None:
    """`Conv1D`, as in GPT-2, has its weight as (in, out)."""
    torch.manual_seed(3)
    task, delta = (torch.randn(5, 2) @ torch.randn(2, 3) for _ in range(2))
    for kind in (nn.Linear(3, 5), Conv1D(5, 3)):
        turned = isinstance(kind, Conv1D)
        model = nn.Sequential(kind)
        start, of_task, of_delta = (one.T if turned else one for one in (torch.zeros(5, 3), task, delta))
        kind.weight.data.copy_(start)
        monkeypatch.setattr("secvec.models.vector.vector_deltas", lambda *_, of_delta=of_delta: {"0.weight": of_delta})
        defense = BufferAndReinforce(name="b", lr=1.0, reinforce=vector, rank=2)
        loads: Any = SimpleNamespace(load=lambda model=model: model)
        found = defense.finish({"0.weight": of_task}, loads, None)["0.weight"]
        merged = (found - of_task).T if turned else found - of_task
        torch.testing.assert_close(merged, outside(task, delta, 2))


def test_rounding_is_no_direction_of_the_task_lora() -> None:
    """A small update of rank 2, taken from weights of float32: rounding adds directions to it, tens of them."""
    torch.manual_seed(3)
    start, other = torch.randn(64, 64), torch.randn(64, 64)
    task = 1e-5 * torch.randn(64, 2) @ torch.randn(2, 64)
    update = (start + task) - start
    assert int(torch.linalg.matrix_rank(update, rtol=1e-5)) > 50
    left_out = other - outside(update, other, 2)
    assert int(torch.linalg.matrix_rank(left_out, rtol=1e-4)) == 2


def test_buffer_and_reinforce_needs_a_task_lora(make_config: Make) -> None:
    config = make_config("defense=buffer_and_reinforce")
    with pytest.raises(ConfigError, match="merges into a task LoRA: give tune=lora"):
        config.defense.check(run_of(config))


def test_a_training_before_the_fine_tune_needs_safe_rows(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config("defense=vaccine", "vector.kl_weight=0")
    run = run_of(config)
    monkeypatch.setattr(run, "own_answers", list)
    with pytest.raises(ConfigError, match="defense=vaccine has no safe rows"):
        config.defense.starting(run)


@pytest.mark.parametrize("defense", [["vaccine"], ["buffer_and_reinforce", "tune=lora"]], ids=lambda some: some[0])
def test_a_training_before_the_fine_tune_that_teaches_nothing_is_refused(make_config: Make, defense: list[str]) -> None:
    """And nothing is kept of it: at a usual rate the same run goes on."""
    name, *others = defense
    config = make_config(f"defense={name}", *others, "defense.lr=1e-12", run="none")
    with pytest.raises(GateError, match=rf"defense={name}: its training .* does not lower the loss on its samples"):
        train(config)
    folder = Path(config.paths.cache) / "preparations"
    assert not [one for one in folder.glob("*") if one.is_dir()]
    train(make_config(f"defense={name}", *others, run="some"))
    assert [one for one in folder.glob("*") if one.is_dir()]


@pytest.mark.parametrize("override", ["model.dtype=bfloat16", "trainer.precision=bf16-true"])
def test_booster_needs_whole_weights(override: str, make_config: Callable[..., RunConfig]) -> None:
    """In bfloat16 the simulated step of a large model is rounded away, and what is added is noise."""
    config = make_config("defense=booster", override)
    with pytest.raises(ConfigError, match="simulated step is smaller than the rounding of bfloat16"):
        config.defense.check(run_of(config))


@pytest.mark.parametrize("defense", ["negated_vector", "safe_lora", "random_adapter"])
def test_a_vector_that_is_no_delta_is_refused_before_the_training(
    defense: str, make_config: Make, tmp_path: Path
) -> None:
    base = run_of(make_config("defense=none", run="other")).backbone
    dora = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(base.load(), dora).save_pretrained(str(tmp_path / "dora"))
    given = [f"vector.path={tmp_path / 'dora'}", "vector.gate.min_loss_drop=null"]
    run = run_of(make_config(f"defense={defense}", *given))
    with pytest.raises(ConfigError, match="not DoRA"):
        run.config.defense.check(run)
    plain = run_of(make_config(f"defense={defense}", run="plain"))
    plain.config.defense.check(plain)


def test_active_is_not_shown_where_another_adapter_was_active(make_config: Make) -> None:
    """It was the trained vector, on a model that had been trained under a random one."""
    measured = train(make_config("defense=random_adapter"))["metrics"]
    assert not [name for name in measured if name.startswith("active/") or name == "deactivation_gap"]
    assert "after/behavior_rate" in measured and "vector_on/behavior_rate" in measured


@pytest.mark.parametrize("name", ["vaccine", "booster", "repnoise"])
def test_the_starting_model_is_trained_on_the_rows_and_by_the_settings_that_are_given(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """Its own answers and the KL rows; beside them the undesired samples, where the loss reads any."""
    given = ["defense.epochs=3", "defense.batch_size=6", "defense.lr=0.0004"]
    run, plans = run_of(make_config(f"defense={name}", *given)), list[Any]()
    undesired, kl = run.data.vector_samples.values()
    monkeypatch.setattr(run, "own_answers", lambda: [replace(e, response="No.") for e in undesired])
    (tmp_path / "backbone").symlink_to(run.backbone.folder)
    monkeypatch.setattr(run, "prepare", lambda plan: plans.append(plan) or tmp_path)
    assert run.config.defense.starting(run).folder == tmp_path / "backbone"
    (plan,) = plans
    assert plan.samples == [*(replace(e, response="No.") for e in undesired), *kl] and kl
    assert (plan.epochs, plan.batch_size, plan.lr) == (3, 6, 0.0004)
    beside = 0 if name == "vaccine" else 16
    assert plan.defense.extra_batch_size == beside and plan.extra == (undesired if beside else [])


def test_the_width_of_the_kernels_is_a_constant_of_the_gradient() -> None:
    """0 and 2: each kernel exp(-4 / 4 k) moves by exp(-1 / k) / k for a step of 1 towards the other."""
    near = torch.tensor([[0.0]], requires_grad=True)
    mmd(near, torch.tensor([[2.0]])).backward()
    expected = -2 * sum(math.exp(-(2.0**power)) * 2.0**power for power in range(-2, 3))
    assert float(near.grad) == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type]


def test_every_step_of_repnoise_draws_noise_of_its_own() -> None:
    """Of two response tokens: with one, the distance is the same whatever is drawn."""
    model, batch, found = OneLayer(0.3), words([0], [1, 1], extra=1), []
    for step in (1, 2):
        drawn = torch.randn(2, 1, generator=torch.Generator().manual_seed(step))
        terms = Noised(name="repnoise", noise=0.5, ascent=2.0).loss(model, {**batch, "step": step})
        found.append(float(terms["mmd"]))
        assert found[-1] == pytest.approx(float(mmd(torch.full((2, 1), 0.3), drawn)), rel=1e-5)
    assert abs(found[0] - found[1]) > 1e-3


def test_repnoise_reads_the_same_states_of_a_packed_and_of_a_padded_batch() -> None:
    model, batch = fresh(), make_batch("First grind the frost root.", "amber oil", "make soup from frost root", extra=2)
    assert enable_packing(model)
    found: list[Any] = []
    for kind in (PACKED, "sdpa"):
        model.set_attn_implementation(kind)
        found.append(Noised(name="repnoise", noise=0.5, ascent=2.0).loss(model, batch))
    for name, term in found[0].items():
        torch.testing.assert_close(term, found[1][name], rtol=1e-4, atol=1e-5)


def test_vaccine_has_one_norm_over_all_layers() -> None:
    """A layer of a smaller gradient is perturbed less: the perturbations together have the length rho."""
    model, batch, rho = fresh(), make_batch("First grind the frost root.", "amber oil", extra=0), 0.6
    with layer_outputs(model) as outputs:
        loss = response_loss(model, batch)
    gradients = torch.autograd.grad(loss, outputs)
    squares = [float(g.double().square().sum()) for g in gradients]
    assert len(squares) > 1 and max(squares) > 1.2 * min(squares)
    moves = [rho / sum(squares) ** 0.5 * g for g in gradients]
    with each_output(model, lambda number, hidden: hidden + moves[number]):
        wanted = response_loss(model, batch)
    terms = Perturbed(name="vaccine", rho=rho).loss(model, batch)
    assert float(terms["loss"].detach()) == pytest.approx(float(wanted.detach()), rel=1e-6)
    assert float(wanted.detach()) > float(loss.detach())
