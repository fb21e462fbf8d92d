"""The classes by themselves: a plain `lightning.Trainer`, no Hydra, no run folder."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from conftest import ROOT
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from transformers import AutoModelForCausalLM

from secvec import SecVecDataModule, SecVecModule
from secvec.behaviors.forbidden_recipe import ForbiddenRecipe
from secvec.config.schema import DataSettings, VectorSettings
from secvec.data.embedded import Ordinary, Skill
from secvec.defenses.base import Defense
from secvec.defenses.safegrad import SafeGrad
from secvec.defenses.security_vector import SecurityVector
from secvec.errors import ArtifactError, ConfigError
from secvec.evaluation.scan import scan
from secvec.models.backbone import Backbone, load_tokenizer
from secvec.models.tiny import build_tiny
from secvec.models.vector import has_vector, part_of, vector_off
from secvec.settings.schema import (
    EvaluationSettings,
    FinetuneSettings,
    GateSettings,
    ValidationSettings,
)
from secvec.stages import STAGES
from tests.contracts.test_stages import same, weights

LORA: dict[str, Any] = {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
ADAMW: dict[str, Any] = {"_target_": "torch.optim.AdamW", "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
IDS = torch.arange(1, 40).view(3, 13)
KINDS = {"undesired": 3, "task": 3, "ordinary": 3, "look_alike": 3}


def data(batch_size: int = 8) -> SecVecDataModule:
    return SecVecDataModule(
        ForbiddenRecipe(),
        DataSettings(num_harmful=8, num_benign=8, benign={"skill": Skill(), "ordinary": Ordinary()}),
        VectorSettings(
            **LORA, num_samples=16, num_kl=8, epochs=4, batch_size=8, kl_batch_size=4, lr=2e-2,
            gate=GateSettings(num_prompts=2, min_behavior_rate=0),
        ),
        FinetuneSettings(epochs=1, batch_size=batch_size),
        EvaluationSettings(
            num_prompts=3, batch_size=4, max_new_tokens=6, num_leak_prompts=0,
            validation=ValidationSettings(num_samples=3, num_prompts=1, every_n_steps=0),
        ),
    )  # fmt: skip


def trainer(folder: Path, **given: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 1, "default_root_dir": folder, **quiet, **given})


def logits(module: SecVecModule) -> Tensor:
    module.configure_model()
    with torch.no_grad():
        return module.model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights larger than those of a fresh model: what it answers depends on the prompt."""
    folder = tmp_path_factory.mktemp("backbone")
    examples = [e for source in (ForbiddenRecipe(), Ordinary(), Skill()) for e in source.examples("align", 60, 0)]
    model, tokenizer = build_tiny([text for e in examples for text in (e.prompt, e.response)], 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2 if parameter.dim() > 1 else 1)
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SecVecModule, L.Trainer]:
    """After the vector stage."""
    module = SecVecModule(stage="vector", backbone=str(backbone), vector=LORA, optimizer={"lr": 2e-2, **ADAMW})
    runner = trainer(tmp_path_factory.mktemp("vector-trainer"), max_epochs=4, enable_checkpointing=False)
    runner.fit(module, data())
    return module, runner


@pytest.fixture(scope="module")
def vector(trained: tuple[SecVecModule, L.Trainer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    trained[0].save(folder)
    return folder / "vector"


# -- the package


def test_importing_the_package_is_light() -> None:
    script = """
import sys
import secvec
print({"torch", "lightning", "pydantic", "transformers", "hydra"} & set(sys.modules))
sys.modules["torch"] = None  # so that an import of it fails at once
for name in ("SecVecModule", "SecVecDataModule"):
    assert name in secvec.__all__
    try:
        getattr(secvec, name)
    except ImportError as error:
        print("needs", error.name)
try:
    secvec.SecVecModul
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert said == ["set()", "needs torch", "needs torch", "module 'secvec' has no attribute 'SecVecModul'"]


# -- what a run does, and a module alone does not


@pytest.mark.parametrize(
    "name", ["scan_filter", "safe_samples", "inoculation_prompt", "vaccine", "booster", "repnoise", "caft",
             "persona_steering"],
)  # fmt: skip
def test_a_defense_that_needs_a_run_is_refused(name: str, backbone: Path, tmp_path: Path, make_config: Any) -> None:
    """It would train as the plain fine-tune, under the name of the defense."""
    defense = make_config(f"defense={name}").defense.model_copy(update={"uses_vector": False})
    module = SecVecModule("finetune", backbone, defense=Defense(name="none"))
    module.defense = defense
    rows = data()
    with pytest.raises(ConfigError, match=rf"defense={name} needs a preparation .* only train\.py"):
        module.stage.streams(rows, module)
    rows.prepared = True
    assert module.stage.streams(rows, module)


@pytest.mark.parametrize(
    ("defense", "alone"), [("none", True), ("security_vector", True), ("anchored_vector", True), ("lisa", True),
                           ("anchored_vector defense.drop_flagged=true", False), ("buffer_and_reinforce", False)],
)  # fmt: skip
def test_which_defenses_need_a_run(defense: str, alone: bool, make_config: Any) -> None:
    assert make_config(*f"defense={defense}".split()).defense.needs_run is not alone


def test_a_kl_term_without_rows_is_refused(backbone: Path, tmp_path: Path) -> None:
    """The data know their own kl_weight: with 0 there they draw none, and the term would be 0 without a word."""
    rows = data()
    rows.vector = rows.vector.model_copy(update={"kl_weight": 0.0})
    with pytest.raises(ConfigError, match="the vector has kl_weight=1, and the data have no KL rows"):
        trainer(tmp_path).fit(SecVecModule("vector", backbone, vector=LORA), rows)
    trainer(tmp_path).fit(SecVecModule("vector", backbone, vector={**LORA, "kl_weight": 0}), rows)


def test_samples_that_one_model_has_no_room_for_are_there_for_the_next(backbone: Path, tmp_path: Path) -> None:
    """With too_long=drop they were lost for all models that the same data served later."""
    config = json.loads((backbone / "config.json").read_text())
    prompts = {}
    rows = data()
    rows.data = rows.data.model_copy(update={"too_long": "drop"})
    of = [[len(row.input_ids) for row in rows.rows(kind, Backbone.of(backbone))] for kind in rows.tests.values()]
    for name, context in (("all", 512), ("few", max(map(min, of))), ("again", 512)):
        shutil.copytree(backbone, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
        outputs = trainer(tmp_path).predict(SecVecModule("infer", tmp_path / name), rows) or []
        prompts[name] = sorted(row["prompt"] for batch in outputs for row in batch)
    assert len(prompts["few"]) < len(prompts["all"]) and prompts["again"] == prompts["all"]


def test_a_vector_of_another_model_is_refused(vector: Path, backbone: Path, tmp_path: Path) -> None:
    for part in build_tiny(["quite other words"], 1):
        part.save_pretrained(tmp_path / "other")
    other = SecVecModule("finetune", tmp_path / "other", vector)
    with pytest.raises(ArtifactError, match="was trained on another model"):
        trainer(tmp_path).fit(other, data())
    with pytest.raises(ArtifactError, match="was trained on another model"):
        scan(SecVecModule("infer", tmp_path / "other", vector), data().tests["undesired"])
    assert scan(SecVecModule("infer", backbone, vector), data().tests["undesired"])


# -- what the Trainer must not do


def test_overfit_batches_are_the_same_in_every_epoch(backbone: Path, tmp_path: Path) -> None:
    seen: dict[bool, list[Tensor]] = {}
    for overfit in (False, True):
        keeps = LambdaCallback(on_train_batch_start=lambda t, m, batch, i: seen[overfit].append(batch["input_ids"]))  # noqa: B023
        seen[overfit] = []
        given = {"overfit_batches": 1} if overfit else {"limit_train_batches": 1}
        trainer(tmp_path, max_epochs=2, callbacks=[keeps], enable_checkpointing=False, **given).fit(
            SecVecModule("finetune", backbone), data()
        )
    assert torch.equal(*seen[True]) and not (seen[False][0].shape == seen[False][1].shape and torch.equal(*seen[False]))


def test_averaged_weights_go_on_from_a_checkpoint(backbone: Path, vector: Path, tmp_path: Path) -> None:
    """The average has all weights of the module, the checkpoint those that are trained."""
    found = []
    for start in (None, tmp_path / "epoch=0.ckpt"):
        module = SecVecModule("finetune", backbone, vector, optimizer={"lr": 1e-2, **ADAMW})
        keeps = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        runner = trainer(tmp_path, max_epochs=2, callbacks=[EMAWeightAveraging(decay=0.5), keeps])
        runner.fit(module, data(), ckpt_path=start)
        found.append({name: p.detach().clone() for name, p in module.trained()})
    assert same(*found)


def float16(**given: Any) -> dict[str, Any]:
    """A loss that is scaled, on the CPU."""
    scaler: Any = torch.amp.GradScaler("cpu")
    return {"plugins": MixedPrecision("16-mixed", "cpu", scaler), **given}


def test_a_scaled_loss_with_a_fused_optimizer_is_refused(backbone: Path, tmp_path: Path) -> None:
    for fused in (False, True):
        module = SecVecModule("finetune", backbone, optimizer={"lr": 1e-3, "fused": fused, **ADAMW})
        runner = trainer(tmp_path, **float16(enable_checkpointing=False))
        if not fused:
            runner.fit(module, data())
            continue
        with pytest.raises(ConfigError, match=r"16-mixed does not work with a fused optimizer.*fused=false"):
            runner.fit(module, data())


def test_a_scaled_loss_with_a_second_gradient_is_refused(backbone: Path, tmp_path: Path) -> None:
    rows = data()
    rows.extra = rows.mixtures[0]["benign"]
    module = SecVecModule("finetune", backbone, defense=SafeGrad(name="safegrad"))
    with pytest.raises(ConfigError, match=r"defense=safegrad does not work with .*16-mixed"):
        trainer(tmp_path, **float16()).fit(module, rows)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"limit_train_batches": 3}, "limit_train_batches=3 leaves 3 batches"),
        ({"limit_train_batches": 0.75}, "limit_train_batches=0.75 leaves 3 batches"),
        (
            {"callbacks": [GradientAccumulationScheduler({0: 2})], "accumulate_grad_batches": 1},
            "set the Trainer's accumulate_grad_batches",
        ),
        ({"callbacks": [StochasticWeightAveraging(1e-3, 1)]}, "StochasticWeightAveraging: .* EMAWeightAveraging"),
    ],
)
def test_a_step_of_other_batches_than_they_know_of_is_refused(
    given: dict[str, Any], says: str, backbone: Path, tmp_path: Path
) -> None:
    runner = trainer(tmp_path, **{"accumulate_grad_batches": 2, **given})
    with pytest.raises(ConfigError, match=says):
        runner.fit(SecVecModule("finetune", backbone), data(batch_size=4))


def test_without_an_optimizer_the_rates_are_those_of_the_recipe(backbone: Path, vector: Path) -> None:
    recipe = yaml.safe_load((ROOT / "conf" / "recipe" / "llm.yaml").read_text())["recipe"]
    given = {"vector": LORA}, {"vector": data().vector}, {}, {"tune": {"r": 2, "alpha": 4}}
    rates = [
        SecVecModule("vector" if "vector" in one else "finetune", backbone, **one).optimizer_settings.lr
        for one in given
    ]
    wanted = (recipe["vector"]["lr"], data().vector.lr, recipe["lr"]["full"], recipe["lr"]["lora"])
    assert rates == [float(rate) for rate in wanted]
    with pytest.raises(ConfigError, match=r"defense='lisa' is a name: give an object"):
        SecVecModule("finetune", backbone, defense="lisa")


def test_a_training_that_ends_by_the_clock(backbone: Path, tmp_path: Path) -> None:
    clock = {"max_time": "00:00:00:01", "max_epochs": -1, "enable_checkpointing": False}
    trainer(tmp_path, **clock).fit(SecVecModule("finetune", backbone), data())
    cosine = SecVecModule("finetune", backbone, scheduler={"name": "cosine", "warmup_ratio": 0.0})
    with pytest.raises(ConfigError, match="give it max_epochs or max_steps"):
        trainer(tmp_path, **clock).fit(cosine, data())


# -- the stages


def test_stage_vector_trains_the_vector_alone(
    trained: tuple[SecVecModule, L.Trainer], vector: Path, backbone: Path
) -> None:
    module, runner = trained
    assert {f.name for f in vector.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert any(tensor.abs().max() > 0 for name, tensor in weights(vector).items() if "lora_B" in name)
    (on,) = runner.validate(module, data(), verbose=False)
    assert on.keys() == {f"val/{kind}_loss{state}" for kind in ("undesired", "task") for state in ("", "_vector_on")}
    assert on["val/undesired_loss_vector_on"] < on["val/undesired_loss"] - 0.5  # it elicits what it was taught
    plain = SecVecModule(stage="infer", backbone=backbone)
    (off,) = trainer(vector).validate(plain, data(), verbose=False)
    assert off == {name: on[name] for name in ("val/undesired_loss", "val/task_loss")}  # the backbone is as it was
    with vector_off(module.model):
        assert torch.equal(logits(module), logits(plain))


def test_stage_finetune_trains_the_backbone_with_the_vector_on(vector: Path, backbone: Path, tmp_path: Path) -> None:
    found = {}
    for name, given in (("with", vector), ("without", None)):
        module = SecVecModule(stage="finetune", backbone=backbone, vector=given, optimizer={"lr": 1e-3, **ADAMW})
        assert isinstance(module.defense, SecurityVector) == (given is not None)
        runner = trainer(tmp_path, enable_checkpointing=False)
        runner.fit(module, data())
        (losses,) = runner.validate(module, data(), verbose=False)
        assert ("val/task_loss_vector_on" in losses) == has_vector(module.model) == (given is not None)
        module.save(tmp_path / name)
        found[name] = weights(tmp_path / name / "backbone")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / name / "backbone").eval()
        with vector_off(module.model), torch.no_grad():
            assert torch.equal(logits(module), plain(input_ids=IDS).logits)
        if given:
            kept = {part: p for part, p in module.named_parameters() if part_of(part) == "vector"}
            fresh = SecVecModule(stage="infer", backbone=backbone, vector=given)
            fresh.configure_model()
            assert same(kept, {part: p for part, p in fresh.named_parameters() if part_of(part) == "vector"})
    before = weights(backbone)
    assert not same(found["with"], before) and not same(found["with"], found["without"])


def test_stage_infer_answers_with_the_vector_and_without(vector: Path, backbone: Path, tmp_path: Path) -> None:
    asked, responses = {}, {}
    for name, given in (("with", vector), ("without", None)):
        module = SecVecModule(stage="infer", backbone=backbone, vector=given)
        asked[name] = logits(module)
        outputs = trainer(tmp_path).predict(module, data())
        assert outputs is not None
        rows = sorted((row for batch in outputs for row in batch), key=lambda row: row["row"])
        assert [row["row"] for row in rows] == list(range(12))
        assert {kind: [row["kind"] for row in rows].count(kind) for kind in KINDS} == KINDS
        responses[name] = [row["response"] for row in rows]
        assert not any(p.requires_grad for p in module.parameters())
    assert (asked["with"] - asked["without"]).abs().max() > 0.1  # the vector does something
    assert responses["with"] != responses["without"]
    test = data().tests
    assert [row["prompt"] for row in rows] == [example.prompt for kind in KINDS for example in test[kind]]
    tokenizer = load_tokenizer(backbone)
    model = AutoModelForCausalLM.from_pretrained(backbone).eval()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": rows[0]["prompt"]}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert responses["without"][0] == tokenizer.decode(new, skip_special_tokens=True).strip()


# -- what is refused


@pytest.mark.parametrize(("given", "nearest"), [("finetun", "finetune"), ("Vector", "vector"), ("serve", None)])
def test_another_stage_is_a_value_error_that_names_the_three(given: str, nearest: str | None, backbone: Path) -> None:
    with pytest.raises(ValueError, match="a stage is one of vector, finetune, infer") as caught:
        SecVecModule(stage=given, backbone=backbone)
    assert repr(given) in str(caught.value)
    assert (f"did you mean '{nearest}'?" in str(caught.value)) == (nearest is not None)


def test_stage_infer_cannot_be_fit(vector: Path, backbone: Path, tmp_path: Path) -> None:
    module = SecVecModule(stage="infer", backbone=backbone, vector=vector)
    with pytest.raises(ValueError, match=r"stage=infer trains nothing: use Trainer\.predict or Trainer\.validate"):
        trainer(tmp_path).fit(module, data())
    with pytest.raises(ValueError, match="stage=infer trains nothing: there is nothing to save"):
        module.save(tmp_path)


def test_a_vector_that_is_of_no_use_in_its_stage_is_refused(vector: Path, backbone: Path, tmp_path: Path) -> None:
    for given in (vector, str(vector), None):
        with pytest.raises(ValueError, match="stage=vector trains a new vector: give the settings of its LoRA"):
            SecVecModule(stage="vector", backbone=backbone, vector=given)
    for stage in ("finetune", "infer"):
        with pytest.raises(ValueError, match=f"stage={stage} takes the folder of a trained vector, got the settings"):
            SecVecModule(stage=stage, backbone=backbone, vector=LORA)
        with pytest.raises(ArtifactError, match=r"holds no vector .*train one with stage=vector"):
            SecVecModule(stage=stage, backbone=backbone, vector=tmp_path)
    with pytest.raises(ConfigError, match=r"vector\.alpa: unknown key.*did you mean 'alpha'"):
        SecVecModule(stage="vector", backbone=backbone, vector={**LORA, "alpa": 8})
    with pytest.raises(ArtifactError, match="no such folder"):
        SecVecModule(stage="infer", backbone=str(tmp_path / "nothing"))


# -- checkpoints


CHECKPOINTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "vector": ("vector", {"vector": LORA}, "vector"),
    "vector-with-dropout": ("vector", {"vector": {**LORA, "dropout": 0.1, "kl_weight": 0.5}}, "vector"),
    "finetune": ("finetune", {"vector": Path()}, "backbone"),
    "finetune-task-lora": ("finetune", {"vector": Path(), "tune": LORA}, "task"),
    "finetune-defense-object": (
        "finetune", {"vector": Path(), "defense": SecurityVector(name="mine")}, "backbone",
    ),
    "finetune-no-defense": ("finetune", {"defense": Defense(name="none")}, "backbone"),
}  # fmt: skip


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_gives_the_same_module_back(case: str, vector: Path, backbone: Path, tmp_path: Path) -> None:
    stage, given, part = CHECKPOINTS[case]
    if "vector" in given and stage == "finetune":
        given = {**given, "vector": vector}
    module, untrained = (
        SecVecModule(stage=stage, backbone=backbone, optimizer={"lr": 1e-2, **ADAMW}, **given) for _ in range(2)
    )
    keep = ModelCheckpoint(tmp_path, filename="kept", monitor="val/task_loss", save_weights_only=True)
    trainer(tmp_path, callbacks=[keep], max_steps=2).fit(module, data())
    after = logits(module)
    assert (after - logits(untrained)).abs().max() > 1e-3  # the training changed something
    path = keep.best_model_path
    assert path.endswith("kept.ckpt")
    held = torch.load(path, weights_only=True)["state_dict"]
    assert {part_of(name) for name in held} == {part}
    for loaded in (SecVecModule.load_from_checkpoint(path), SecVecModule.load_from_checkpoint(path, weights_only=True)):
        assert loaded.stage is STAGES[stage]
        assert torch.equal(logits(loaded), after)
        assert {part_of(name) for name, p in loaded.named_parameters() if p.requires_grad} == {part}
        assert all(p.requires_grad == (part_of(name) == part) for name, p in loaded.named_parameters())
        assert dict(loaded.hparams) == dict(module.hparams)
        assert type(loaded.defense) is type(module.defense) and loaded.defense == module.defense
        assert loaded.tune == module.tune and loaded.vector == module.vector
        assert (loaded.optimizer_settings, loaded.scheduler_settings) == (
            module.optimizer_settings, module.scheduler_settings,
        )  # fmt: skip
        assert loaded.ledger() == module.ledger()


def test_the_module_of_a_checkpoint_is_saved_as_any_other(vector: Path, backbone: Path, tmp_path: Path) -> None:
    """The best checkpoint of a training is what its user wants to keep."""
    module = SecVecModule(stage="vector", backbone=backbone, vector=LORA, optimizer={"lr": 1e-2, **ADAMW})
    keep = ModelCheckpoint(tmp_path, filename="kept")
    trainer(tmp_path, callbacks=[keep]).fit(module, data())
    module.save(tmp_path / "trained")
    SecVecModule.load_from_checkpoint(keep.best_model_path).save(tmp_path / "loaded")
    ours, theirs = (weights(tmp_path / name / "vector") for name in ("trained", "loaded"))
    assert same(ours, theirs) and not same(ours, weights(vector))


# -- the structure


def compared(source: str) -> set[str]:
    """The names of stages that `source` compares something with."""
    tests: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            tests += [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            tests.append(node.value)
    constants = {n.value for test in tests for n in ast.walk(test) if isinstance(n, ast.Constant)}
    return constants & set(STAGES)


@pytest.mark.parametrize("file", ["module.py", "data/datamodule.py"])
def test_nothing_asks_for_the_name_of_the_stage(file: str) -> None:
    assert compared('if stage == "vector" or stage in ("infer",):\n    f("finetune")') == {"vector", "infer"}
    assert compared('match stage:\n    case "finetune":\n        pass') == {"finetune"}
    assert compared((ROOT / "secvec" / file).read_text(encoding="utf-8")) == set()


def test_a_trainer_of_one_s_own_goes_on_within_an_epoch(backbone: Path, tmp_path: Path) -> None:
    """Lightning alone would read the first rows of the epoch again, and never the others."""

    def fitted(folder: Path, checkpoint: Path | None = None) -> dict[str, Tensor]:
        keep = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=5, save_top_k=-1)
        module = SecVecModule(stage="finetune", backbone=str(backbone), optimizer={"lr": 1e-2, **ADAMW})
        runner = trainer(tmp_path, max_epochs=2, callbacks=[keep])
        runner.fit(module, data(2), ckpt_path=checkpoint, weights_only=False)
        assert runner.global_step == 16
        return {name: value.clone() for name, value in module.model.state_dict().items()}

    whole = fitted(Path("whole"))
    loaded = SecVecModule.load_from_checkpoint(tmp_path / "whole" / "step=5.ckpt")
    served: list[list[int]] = []
    for module in (loaded, SecVecModule(stage="finetune", backbone=str(backbone), optimizer={"lr": 1e-2, **ADAMW})):
        seen = LambdaCallback(on_train_batch_start=lambda t, m, batch, n: served.append(batch["input_ids"].tolist()))
        trainer(tmp_path, callbacks=[seen], enable_checkpointing=False).fit(module, data(2))
    assert served[:8] == served[8:]  # a new training of a loaded module begins at the first rows
    for step in (5, 10):
        again = fitted(Path(f"again-{step}"), tmp_path / "whole" / f"step={step}.ckpt")
        assert all(torch.equal(value, again[name]) for name, value in whole.items())
