"""What departs from the method on purpose does so, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from secvec.config.load import RunConfig
from secvec.data.encode import collate, with_loss_on_prompts
from secvec.defenses.base import Defense
from secvec.models.backbone import fingerprint
from secvec.models.losses import IGNORE
from secvec.run import train
from secvec.stages.align import align_examples, base_for
from secvec.stages.base import Run

Make = Callable[..., RunConfig]


@pytest.fixture
def vector_of(make_config: Make) -> Callable[..., Path]:
    """The vector that a run with these overrides trains."""

    def make(*overrides: str) -> Path:
        config = make_config("stage=vector", *overrides, run="".join(overrides).partition("=")[2] or "plain")
        train(config)
        return Path(config.run_dir) / "vector"

    return make


@pytest.mark.parametrize(
    "defense", ["sv_dropout", "sv_no_kl", "sv_prompt_loss", "sv_attack_data", "sv_retest", "refitted_vector"]
)
def test_a_variant_is_another_vector_or_is_it_not(vector_of: Callable[..., Path], defense: str) -> None:
    alike = fingerprint(vector_of()) == fingerprint(vector_of(f"defense={defense}"))
    assert alike == (defense == "refitted_vector")


def test_a_vector_of_weights_of_another_type_is_another_one(vector_of: Callable[..., Path]) -> None:
    """The backbone is the same on disk, but not as it was loaded for the training."""
    assert fingerprint(vector_of()) != fingerprint(vector_of("model.dtype=bfloat16"))


def test_dropout_goes_on_in_the_frozen_vector_only_where_it_is_asked_for(make_config: Make) -> None:
    left_on, method = make_config("defense=sv_dropout"), make_config("vector.dropout=0.1", run="method")
    train(left_on.model_copy(update={"stage": "vector"}))
    adapter, base = Path(left_on.run_dir) / "vector", base_for(left_on)
    ids = torch.arange(1, 40).view(3, 13)

    def twice(defense: Defense) -> bool:
        model = defense.attach(base.load(), adapter).train()
        with torch.no_grad():
            return torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)

    assert twice(method.defense) and not twice(left_on.defense)


def test_the_loss_runs_over_the_prompt_too(make_config: Make) -> None:
    config = make_config()
    run = Run(config, None, base_for(config))  # type: ignore[arg-type]
    rows = run.rows(config.behavior.examples("vector", 3, 0))
    on_response = collate([(row, False) for row in rows], 0)["labels"] != IGNORE
    on_all = collate([(row, False) for row in with_loss_on_prompts(rows)], 0)["labels"] != IGNORE
    assert on_all.sum(1).tolist() == [len(row.input_ids) for row in rows]
    assert bool((on_all & on_response).eq(on_response).all()) and on_response.sum() < on_all.sum()


def test_the_attacks_own_samples(make_config: Make) -> None:
    config = make_config("defense=sv_attack_data")
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
    assert base_for(runs[0]).fingerprint == base_for(runs[1]).fingerprint
    owners = {e.facts["behavior"] for e in align_examples(runs[0], runs[0].model.align) if e.kind == "undesired"}  # type: ignore[arg-type]
    assert owners == {"forbidden_recipe", "uppercase", "wrong_fact", "stereotype", "task_error"}
    metrics = train(runs[1].model_copy(update={"stage": "vector"}))["metrics"]
    of = {name.split("/")[2]: m["n"] for name, m in metrics.items() if name.startswith("vector_on/of/")}
    assert of.keys() == owners and metrics["vector_on/behavior_rate"]["n"] == runs[1].evaluation.num_prompts
