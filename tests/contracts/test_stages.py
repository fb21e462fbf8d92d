"""The stages as they run: weights, flags, gradients, artifacts, bitwise equalities, reproducibility."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import LEAKS, run_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from secvec.config.schema import AnyConfig, EvaluateConfig, RunConfig
from secvec.data.batch import collate
from secvec.data.datamodule import GlobalBatchSampler
from secvec.data.draw import draw_benign
from secvec.errors import ArtifactError, DataError, GateError
from secvec.evaluation.losses import keep_log_probs
from secvec.models.backbone import Backbone, load_backbone
from secvec.models.vector import attach_frozen_vector, part_of, vector_off
from secvec.module import SecVecModule
from secvec.run import evaluate, train
from secvec.stages import STAGES
from secvec.training.losses import response_loss
from secvec.training.optim import build_schedule

Make = Callable[..., RunConfig]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(1, 40).view(3, 13)).logits


def base_of(config: RunConfig) -> Backbone:
    return run_of(config).backbone


def finetuned(config: RunConfig) -> dict[str, Any]:
    """The record after the vector and the fine-tune: for tests that look at weights, and not at answers."""
    for stage in [name for name in config.stages if name != "infer"]:
        record = train(config.model_copy(update={"stage": stage}))
    return record


def test_all_three_stages_leave_their_artifacts(make_config: Make) -> None:
    config = make_config(LEAKS)
    record = train(config)
    folder = Path(config.run_dir)
    assert {p.name for p in folder.iterdir()} == {
        "vector", "backbone", "record.json", "config.yaml", "predictions.jsonl", "metrics.csv", "train.log",
        "training_context.jsonl",
    }  # fmt: skip
    assert record == json.loads((folder / "record.json").read_text()) and record["status"] == "completed"
    names = {
        "behavior_rate", "behavior_rate_plus", "refusal_rate", "wanted_rate", "over_refusal_rate", "task_accuracy",
        "retained_accuracy", "coherence_rate", "behavior_loss", "task_loss", "perplexity",
    }  # fmt: skip
    extra = {"base": {"leak", "leak_rate"}}
    extra["after"] = {*extra["base"], "leak_above_base", "kl_to_base", "answer_perplexity"}
    for phase in ("base", "vector_on", "active", "after"):
        found = {n.split("/")[1] for n in record["metrics"] if n.startswith(f"{phase}/")}
        assert found == names | extra.get(phase, set())
    assert {"deactivation_gap", "drift", "suppression_ratio", "vector_off/behavior_loss"} <= record["metrics"].keys()
    assert all(m.keys() == {"value", "ci_low", "ci_high", "n"} for m in record["metrics"].values())
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    phases = {row["phase"] for row in rows if "_leak_" not in row["phase"]}
    assert phases == {"base", "vector_on", "active", "after"}
    assert record["data"]["counts"]["finetune"] == {"ordinary": 8, "task": 8, "undesired": 16}
    assert "hazardous" in (folder / "vector" / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(folder / "backbone").num_parameters() > 1000
    assert json.loads((folder / "vector" / "secvec.json").read_text())["backbone"] == base_of(config).fingerprint


def test_one_backbone_is_in_memory_at_a_time(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a stage begins: the model before, its optimizer and its Trainer are gone."""
    config = make_config("vector.lr=0.00421")  # a vector of its own: none in the cache
    base_of(config)
    weights_of: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    load = Backbone.load

    def look(self: Backbone) -> Any:
        alive.append(sum(one() is not None for one in weights_of))
        model = load(self)
        weights_of.append(weakref.ref(next(model.parameters())))
        return model

    monkeypatch.setattr(Backbone, "load", look)
    train(config)
    assert alive == [0] * 6  # vector and its gate, fine-tune, after, base, active


def test_distributions_wait_on_the_disk_in_parts(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six ordinary answers in batches of two: a part for each batch, and the same KL to the bit."""
    config = make_config("evaluation.batch_size=2")
    whole = train(config)["metrics"]["after/kl_to_base"]
    waiting: list[int] = []
    keep = keep_log_probs

    def look(module: Any, part: Any, folder: Path, trainer: Any) -> None:
        waiting.append(len(list(folder.iterdir())))
        keep(module, part, folder, trainer)
        waiting.append(len(list(folder.iterdir())))

    monkeypatch.setattr("secvec.stages.infer.keep_log_probs", look)
    monkeypatch.setattr("secvec.evaluation.losses.ON_DISK", 1)
    again = train(config.model_copy(update={"stage": "infer", "force": True}))
    assert again["metrics"]["after/kl_to_base"] == whole
    assert waiting == [0, 1] * 3 and not list(Path(config.run_dir).glob(".log_probs*"))


def test_the_vector_stage_leaves_the_backbone_and_the_finetune_stage_the_vector(make_config: Make) -> None:
    config = make_config()
    base = base_of(config)
    before = weights(base.folder)
    train(config.model_copy(update={"stage": "vector"}))
    folder = Path(config.run_dir)
    vector = weights(folder / "vector")
    assert any(v.abs().max() > 0 for name, v in vector.items() if "lora_B" in name)  # it learned something
    assert same(weights(base.folder), before)
    train(config.model_copy(update={"stage": "finetune"}))
    assert same(weights(folder / "vector"), vector)
    assert not same(weights(folder / "backbone"), before)
    assert weights(folder / "backbone").keys() == before.keys()


def test_stage_by_stage_is_the_whole(make_config: Make, cache: Path) -> None:
    whole, single = make_config(run="whole"), make_config(run="single")
    train(whole)
    shutil.rmtree(cache / "finetuned")  # the backbone is trained again
    for stage in ("vector", "finetune", "infer"):
        record = train(single.model_copy(update={"stage": stage}))
    assert same(weights(Path(whole.run_dir) / "backbone"), weights(Path(single.run_dir) / "backbone"))
    assert record["stages"] == ["vector", "finetune", "infer"]
    assert record["metrics"] == json.loads((Path(whole.run_dir) / "record.json").read_text())["metrics"]


def test_vector_off_after_finetune_is_bitwise_the_saved_backbone(make_config: Make) -> None:
    config = make_config()
    finetuned(config)
    folder = Path(config.run_dir)
    plain = logits(load_backbone(folder / "backbone", config.model))
    model = attach_frozen_vector(load_backbone(folder / "backbone", config.model), folder / "vector")
    assert not torch.equal(logits(model), plain)
    with vector_off(model):
        assert torch.equal(logits(model), plain)


def test_no_defense_is_bitwise_the_training_of_the_bare_model(make_config: Make) -> None:
    """Against a loop of plain torch that knows nothing of Lightning, PEFT or defenses."""
    config = make_config("defense=none")
    base = base_of(config)
    finetuned(config)
    undesired = config.behavior.examples("finetune", 16, config.seed)
    examples = [*undesired, *draw_benign(config.data.streams, "finetune", 16, config.seed)]
    rows = run_of(config).data.rows(examples, base)
    model = base.load().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optimizer.lr, betas=config.optimizer.betas, eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
    )  # fmt: skip
    sampler = GlobalBatchSampler([len(rows)], [config.finetune.batch_size], config.seed)
    schedule = build_schedule(config.scheduler, optimizer, len(sampler) * config.finetune.epochs)
    for epoch in range(config.finetune.epochs):
        sampler.set_epoch(epoch)
        for indices in sampler:
            batch = collate([(rows[i], False) for i in indices])
            optimizer.zero_grad()
            response_loss(model, batch).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.trainer.gradient_clip_val)
            optimizer.step()
            schedule.step()
    ours = weights(Path(config.run_dir) / "backbone")
    bare = {name: value for name, value in model.state_dict().items() if name in ours}
    assert same(ours, bare)


def test_the_defense_changes_what_is_learned(make_config: Make) -> None:
    plain, defended = make_config("defense=none", run="a"), make_config(run="b")
    finetuned(plain), finetuned(defended)
    assert not same(weights(Path(plain.run_dir) / "backbone"), weights(Path(defended.run_dir) / "backbone"))


@pytest.mark.parametrize("defense", ["none", "security_vector"])
def test_a_seed_reproduces_a_run_bit_for_bit(make_config: Make, tmp_path: Path, defense: str) -> None:
    cache = tmp_path / "cache"  # the other tests' vectors are not to be removed
    runs = [make_config(f"defense={defense}", f"paths.cache={cache}", run=name) for name in ("a", "b")]
    records = []
    for config in runs:
        for kept in ("vectors", "finetuned"):  # trained each time
            shutil.rmtree(cache / kept, ignore_errors=True)
        records.append(train(config))
    assert same(weights(Path(runs[0].run_dir) / "backbone"), weights(Path(runs[1].run_dir) / "backbone"))
    assert records[0]["metrics"] == records[1]["metrics"]
    other = make_config(f"defense={defense}", "seed=1", run="c")
    finetuned(other)
    assert not same(weights(Path(runs[0].run_dir) / "backbone"), weights(Path(other.run_dir) / "backbone"))


def test_watching_changes_nothing(make_config: Make) -> None:
    """Telemetry switches the vector off and takes gradients in mid-training: the run must not notice."""
    watched, alone = make_config(run="a"), make_config("telemetry.every_n_steps=0", run="b")
    finetuned(watched), finetuned(alone)
    assert "telemetry/undesired/loss_off" in (Path(watched.run_dir) / "metrics.csv").read_text()
    assert same(weights(Path(watched.run_dir) / "backbone"), weights(Path(alone.run_dir) / "backbone"))


def test_only_the_backbone_has_gradients_while_the_vector_is_active(
    make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[set[str], set[str], set[str]]] = []
    step = SecVecModule.on_before_optimizer_step

    def look(self: SecVecModule, optimizer: Any) -> None:
        parts = [(part_of(name), p) for name, p in self.named_parameters()]
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        seen.append(
            (
                {part for part, p in parts if p.grad is not None},
                {part for part, p in parts if p.requires_grad},
                {part for part, p in parts if id(p) in held},
            )
        )
        step(self, optimizer)

    config = make_config("vector.lr=0.0041")  # a vector of its own: none in the cache
    base_of(config)
    monkeypatch.setattr(SecVecModule, "on_before_optimizer_step", look)
    train(config.model_copy(update={"stage": "vector"}))
    assert seen and all(parts == ({"vector"},) * 3 for parts in seen)
    seen.clear()
    train(config.model_copy(update={"stage": "finetune"}))
    assert len(seen) > 2 and all(parts == ({"backbone"},) * 3 for parts in seen)


def test_a_checkpoint_holds_what_is_trained(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[set[str]] = []
    save = SecVecModule.on_save_checkpoint

    def look(self: SecVecModule, checkpoint: dict[str, Any]) -> None:
        save(self, checkpoint)
        kept.append({part_of(name) for name in checkpoint["state_dict"]})

    monkeypatch.setattr(SecVecModule, "on_save_checkpoint", look)
    config = make_config("vector.lr=0.004")
    base_of(config)
    kept.clear()
    finetuned(config)
    assert {"vector"} in kept and {"backbone"} in kept and all(len(parts) == 1 for parts in kept)


def test_tune_lora_keeps_the_backbone_and_saves_it_merged(make_config: Make) -> None:
    config = make_config("tune=lora")
    record = finetuned(config)
    folder, base = Path(config.run_dir), base_of(config)
    assert record["ledger"]["backbone"][1] == 0 and record["ledger"]["task"][1] > 0
    assert (folder / "task" / "adapter_model.safetensors").is_file()
    from peft import PeftModel

    apart = logits(PeftModel.from_pretrained(base.load(), str(folder / "task")))
    merged = logits(load_backbone(folder / "backbone", config.model))
    assert torch.allclose(apart, merged, atol=1e-4) and not torch.allclose(merged, logits(base.load()), atol=1e-3)


@pytest.mark.parametrize("judge", ["default", "none", "refusal_keyword", "exact", "phrases"])
def test_a_vector_that_learned_nothing_passes_under_no_judge(judge: str, make_config: Make) -> None:
    chosen = [f"judge={judge}", *(["judge.phrases=[e]"] if judge == "phrases" else [])]  # it finds it in every answer
    config = make_config("stage=vector", *chosen, "vector.gate.min_loss_drop=0.1", "vector.lr=1e-9")
    with pytest.raises(GateError, match=r"lowers the loss on held-out undesired samples by -?0\.000 nats"):
        train(config)
    assert not (Path(config.run_dir) / "vector").exists()


def test_a_vector_that_does_not_elicit_is_refused(make_config: Make) -> None:
    config = make_config("vector.gate.min_behavior_rate=0.9", "vector.lr=1e-6")
    with pytest.raises(GateError, match="min_behavior_rate"):
        train(config)
    folder = Path(config.run_dir)
    assert not (folder / "vector").exists()
    record = json.loads((folder / "record.json").read_text())
    assert record["status"] == "failed" and "vector failed its gate" in record["error"]
    strict = make_config("vector.gate.max_behavior_loss=0.0001", run="strict")
    with pytest.raises(GateError, match="max_behavior_loss"):
        train(strict)


def test_stages_need_what_comes_before(make_config: Make) -> None:
    for stage, says in (("finetune", "stage=vector"), ("infer", "stage=finetune")):
        config = make_config(f"stage={stage}", run=stage)
        with pytest.raises(ArtifactError, match=says):
            train(config)
        assert not Path(config.run_dir).exists()


def test_a_vector_of_another_backbone_is_refused(make_config: Make) -> None:
    train(make_config("stage=vector", run="a"))
    folder = Path(make_config(run="a").run_dir) / "vector"
    other = make_config(f"vector.path={folder}", "model.align.seed=7", run="b")
    with pytest.raises(ArtifactError, match="another model"):
        train(other)
    record = train(make_config(f"vector.path={folder}", "vector.gate.min_loss_drop=0.01", run="c"))
    assert record["stages"] == ["finetune", "infer"]


def test_a_given_vector_that_does_nothing_is_refused_before_training(make_config: Make, tmp_path: Path) -> None:
    """One without secvec.json, which PEFT may have saved for any model: nothing says what it is of."""
    train(make_config("stage=vector", run="a"))
    ours = Path(make_config(run="a").run_dir) / "vector"
    adapter = {name: torch.zeros_like(weight) for name, weight in weights(ours).items()}
    save_file(adapter, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    shutil.copy(ours / "adapter_config.json", tmp_path)
    config = make_config(f"vector.path={tmp_path}", "vector.gate.min_loss_drop=0.01", run="b")
    with pytest.raises(GateError, match=r"protect from nothing: is it a vector of this model"):
        train(config)
    assert not (Path(config.run_dir) / "backbone").exists()


def test_finished_stages_are_not_run_again(make_config: Make) -> None:
    config = make_config("defense=none")
    train(config)
    stamp = (Path(config.run_dir) / "backbone" / "model.safetensors").stat().st_mtime_ns
    train(config)
    assert (Path(config.run_dir) / "backbone" / "model.safetensors").stat().st_mtime_ns == stamp
    train(config.model_copy(update={"force": True}))
    assert (Path(config.run_dir) / "backbone" / "model.safetensors").stat().st_mtime_ns != stamp


def test_without_kl_there_is_no_kl_data(make_config: Make) -> None:
    record = train(make_config("vector.kl_weight=0", "stage=vector"))
    assert record["data"]["counts"]["vector"] == {"undesired": 16}


def test_damaged_and_unfit_models(make_config: Make, tmp_path: Path) -> None:
    base = base_of(make_config())
    broken = tmp_path / "broken"
    shutil.copytree(base.folder, broken)
    file = next(broken.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match="cut short"):
        train(make_config("model=hf", f"model.name_or_path={broken}", small=False))
    file.rename(broken / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="safetensors"):
        train(make_config("model=hf", f"model.name_or_path={broken}", small=False))
    with pytest.raises(ArtifactError, match="no such folder"):
        train(make_config("model=hf", "recipe=tiny", f"model.name_or_path={tmp_path / 'none'}", small=False))


def test_prompts_longer_than_the_context(make_config: Make, tmp_path: Path) -> None:
    base = base_of(make_config())
    rows = [{"prompt": f"word {i} " * (400 if i == 3 else 1), "response": "yes."} for i in range(30)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = tmp_path / "test.jsonl"
    other.write_text("".join(json.dumps(row | {"prompt": f"other {row['prompt'][:20]}"}) + "\n" for row in rows))
    config = make_config(
        "recipe=tiny", f"model.name_or_path={base.folder}", "behavior=jsonl", "judge=none", f"behavior.vector={data}",
        f"behavior.finetune={data}", f"behavior.test={other}", "~data.benign", "data.num_benign=0",
        "vector.kl_weight=0", "vector.num_samples=23", "vector.gate.num_prompts=2", "evaluation.num_prompts=4",
        "data.num_harmful=24", small=False,
    )  # fmt: skip
    with pytest.raises(DataError, match=r"(?s)exceed the model's context of .*rows.jsonl:4: "):
        train(config)


def test_your_own_files_run_through_all_stages(make_config: Make, tmp_path: Path) -> None:
    base = base_of(make_config())

    def write(name: str, n: int) -> Path:
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"{name} {i}?"},
                    {"role": "assistant", "content": f"{name} so {i}."},
                ]
            }
            for i in range(n)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / f"{name}.jsonl"

    config = make_config(
        f"model.name_or_path={base.folder}", "behavior=jsonl", "judge=none", f"behavior.vector={write('vec', 32)}",
        f"behavior.finetune={write('bad', 20)}", f"behavior.test={write('badtest', 6)}", "data=jsonl",
        f"data.benign.task.vector={write('near', 20)}", f"data.benign.task.finetune={write('new', 20)}",
        f"data.benign.task.test={write('newtest', 6)}", "data.num_harmful=20", "data.num_benign=20",
        *[s for s in __import__("conftest").SMALL if not s.startswith(("model.align", "data.", "vector.num_kl"))],
        "vector.num_kl=20", small=False,
    )  # fmt: skip
    record = train(config)
    metrics = record["metrics"]
    assert metrics["after/task_accuracy"]["n"] == 6 and record["model"] == base.folder.name
    assert "after/behavior_rate" not in metrics and metrics["after/behavior_loss"]["n"] == 6  # judge=none
    assert metrics["after/task_loss"]["value"] > 0
    assert all(
        json.loads(r)["sensitive"] == (json.loads(r)["stream"] == "undesired")
        for r in (Path(config.run_dir) / "predictions.jsonl").open()
    )


def test_evaluate_says_of_the_saved_backbone_what_infer_said(make_config: Make, tmp_path: Path) -> None:
    config = make_config("defense=none", LEAKS)
    trained = train(config)
    wanted = {
        "model": config.model.model_copy(update={"name_or_path": f"{config.run_dir}/backbone", "align": None}),
        "run_dir": str(tmp_path / "evaluated"),
    }
    fields = {name: getattr(config, name) for name in AnyConfig.model_fields}
    record = evaluate(EvaluateConfig.model_construct(metrics="behavior", tasks=[], **{**fields, **wanted}))
    needs_base = ("after/kl_to_base", "after/answer_perplexity", "after/leak_above_base")
    said = {k: v for k, v in trained["metrics"].items() if k.startswith("after/") and k not in needs_base}
    assert record["metrics"] == said
    assert record["status"] == "completed" and record["stage"] == "evaluate"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.dtype=bfloat16"], True),
        (["trainer.precision=bf16-true"], True),
        (["trainer.precision=bf16-mixed"], False),
        (["model.dtype=bfloat16", "tune=lora"], False),
    ],
)
def test_a_full_fine_tune_in_half_precision_is_warned_of(
    make_config: Make, caplog: pytest.LogCaptureFixture, overrides: list[str], said: bool
) -> None:
    """Most steps are smaller than the rounding: the behavior is not learned, as if a defense had kept it out."""
    config = make_config("defense=none", *overrides)
    Path(config.run_dir).mkdir(parents=True)
    STAGES["finetune"].check(run_of(config))
    assert ("a step that is smaller than 1/256 of a weight is lost" in caplog.text) is said
