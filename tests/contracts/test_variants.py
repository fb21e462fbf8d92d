"""What departs from the method on purpose does so, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_of

from secvec.config.schema import RunConfig
from secvec.data.batch import IGNORE, collate
from secvec.data.datamodule import SecVecDataModule
from secvec.run import train
from secvec.stages.align import align_examples
from tests.contracts.test_stages import same, weights

Make = Callable[..., RunConfig]
DEPARTURES = ("dropout", "no_kl", "prompt_loss", "attack_data", "retest")
ALL = ("default", *DEPARTURES, "smollm2", "[smollm2,retest]")


@pytest.fixture
def vector_of(make_config: Make) -> Callable[..., Path]:
    """The vector that a run with these overrides trains."""

    def make(*overrides: str) -> Path:
        config = make_config("stage=vector", *overrides, run="".join(overrides).partition("=")[2] or "plain")
        train(config)
        return Path(config.run_dir) / "vector"

    return make


@pytest.mark.parametrize(
    "variant", [*(f"vector={name}" for name in DEPARTURES), "defense=refitted_vector", "vector.keep_dropout=true"]
)
def test_a_variant_is_another_vector_or_is_it_not(vector_of: Callable[..., Path], variant: str) -> None:
    alike = same(weights(vector_of()), weights(vector_of(variant)))
    assert alike == (not variant.startswith("vector="))


def test_the_retest_is_all_departures_together_on_any_vector(make_config: Make) -> None:
    """`vector=[smollm2,retest]` is the vector of SmolLM2 but for what the re-test changes."""
    shown = {
        name: make_config(f"vector={name}", small=False).vector.model_dump(exclude={"target_modules", "gate"})
        for name in ALL
    }
    changed = {name: dict(shown[name].items() - shown["default"].items()) for name in DEPARTURES}
    together = {key: value for name in DEPARTURES for key, value in changed[name].items()}
    assert together == changed["retest"] and len(together) == 8  # with the name
    assert shown["[smollm2,retest]"] == shown["smollm2"] | changed["retest"]
    assert shown["smollm2"]["epochs"] != shown["[smollm2,retest]"]["epochs"] == 1


def test_a_vector_of_weights_of_another_type_is_another_one(vector_of: Callable[..., Path]) -> None:
    """The backbone is the same on disk, but not as it was loaded for the training."""
    assert not same(weights(vector_of()), weights(vector_of("model.dtype=bfloat16")))


def test_dropout_goes_on_in_the_frozen_vector_only_where_it_is_asked_for(make_config: Make) -> None:
    left_on, method = make_config("vector=dropout"), make_config("vector.dropout=0.1", run="method")
    for config in (left_on, method):
        train(config.model_copy(update={"stage": "vector"}))
    base = run_of(left_on).backbone
    ids = torch.arange(1, 40).view(3, 13)

    def twice(config: RunConfig) -> bool:
        model = config.defense.attach(base.load(), Path(config.run_dir) / "vector").train()
        with torch.no_grad():
            return torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)

    assert twice(method) and not twice(left_on)


def test_the_loss_runs_over_the_prompt_too(make_config: Make) -> None:
    config = make_config()
    run = run_of(config)
    rows = run.data.rows(config.behavior.examples("vector", 3, 0), run.backbone)
    on_response = collate([(row, False) for row in rows])["labels"] != IGNORE
    on_all = collate([(replace(row, num_prompt=0), False) for row in rows])["labels"] != IGNORE
    assert on_all.sum(1).tolist() == [len(row.input_ids) for row in rows]
    assert bool((on_all & on_response).eq(on_response).all()) and on_response.sum() < on_all.sum()


def test_the_attacks_own_samples(make_config: Make) -> None:
    config = make_config("vector=attack_data")
    record = train(config)
    assert config.vector.num_samples == record["data"]["counts"]["vector"]["undesired"] == config.data.num_harmful
    attack = config.behavior.examples("finetune", config.data.num_harmful, config.seed)
    assert config.behavior.examples(config.vector.split, config.vector.num_samples, config.seed) == attack


def test_a_vector_of_another_behavior(make_config: Make) -> None:
    """It is gated on its own behavior, and the run's is what is attacked with and asked for."""
    config = make_config("behavior=uppercase", "behavior@vector.behavior=forbidden_recipe", "model=tiny_joint")
    record = train(config)
    assert json.loads((Path(config.run_dir) / "vector" / "secvec.json").read_text())["behavior"] == "forbidden_recipe"
    assert {"refusal_rate", "behavior_rate"} <= {name.split("/")[1] for name in record["metrics"] if "gate/" in name}
    asked = [json.loads(line) for line in (Path(config.run_dir) / "predictions.jsonl").read_text().splitlines()]
    assert all("grind" not in row["reference"] for row in asked if row["stream"] == "undesired")


def test_one_base_for_several_behaviors(make_config: Make) -> None:
    """Runs of different behaviors start from the same one; each behavior has rates of its own."""
    runs = [make_config("model=tiny_joint", f"behavior={name}", run=name) for name in ("uppercase", "all_embedded")]
    first, second = (run_of(config).backbone for config in runs)
    assert first.fingerprint == second.fingerprint
    align = runs[0].model.align
    assert align and align.behavior
    examples = align_examples(align.behavior, runs[0].data, align)
    owners = {e.facts["behavior"] for e in examples if e.kind == "undesired"}
    assert owners == {"forbidden_recipe", "uppercase", "wrong_fact", "stereotype", "task_error"}
    metrics = train(runs[1].model_copy(update={"stage": "vector"}))["metrics"]
    of = {name.split("/")[2]: m["n"] for name, m in metrics.items() if name.startswith("vector_on/of/")}
    assert of.keys() == owners and metrics["vector_on/behavior_rate"]["n"] == runs[1].evaluation.num_prompts


def test_attack_data_are_those_of_the_attack_also_by_a_ratio(make_config: Callable[..., RunConfig]) -> None:
    data = SecVecDataModule.of(make_config("vector=attack_data", "data.harmful_ratio=0.25"))
    attack = {example.key for example in data.mixtures[0]["undesired"]}
    assert {example.key for example in data.vector_samples["undesired"]} == attack
    assert len(attack) == data.data.counts[0] < (data.vector.num_samples or 0)


def test_each_of_several_streams_has_metrics_of_its_own(make_config: Make, tmp_path: Path) -> None:
    """Under its own way of comparing; together they are the metrics of their kind."""
    rows = [{"prompt": f"{n} and {n}?", "response": f"It is {2 * n}."} for n in range(2500)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["+stream@data.benign.sums=jsonl", f"data.benign.sums.file={tmp_path / 'sums.jsonl'}"]
    config = make_config("defense=none", *given, "data.benign.sums.metric=rougeL", "evaluation.num_prompts=8")
    metrics = train(config)["metrics"]
    assert metrics["after/of/sums/task_score"]["n"] == metrics["after/of/task/task_accuracy"]["n"] == 4
    assert metrics["after/task_score"] == metrics["after/of/sums/task_score"]
    assert metrics["after/task_accuracy"] == metrics["after/of/task/task_accuracy"]
    both = [metrics[f"after/of/{name}/task_loss"]["value"] for name in ("sums", "task")]
    assert both[0] != both[1] and metrics["after/task_loss"]["value"] == pytest.approx(sum(both) / 2)
    assert not any("/of/" in name for name in train(make_config("defense=none", run="one"))["metrics"])
