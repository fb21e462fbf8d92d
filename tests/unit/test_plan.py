"""The plan before a run: its arithmetic by hand, what it refuses, and that it writes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from secvec.config.load import RunConfig
from secvec.errors import ConfigError, DataError, SecVecError
from secvec.planning.architectures import KNOWN, architecture_of, shape_of
from secvec.planning.budget import Budget
from secvec.planning.flops import (
    GPUS,
    Shape,
    asking_memory,
    checkpoint_bytes,
    decode_steps,
    forward_flops,
    seconds,
    training_flops,
    training_memory,
)
from secvec.planning.lengths import PROMPT_TOKENS, RESPONSE_TOKENS
from secvec.planning.table import duration, plan, size

ROOT = Path(__file__).parents[2]
LLAMA_7B = "model.name_or_path=meta-llama/Llama-2-7b-chat-hf"
PAPER = ["harmbase", "harmlarge", "hallucination"]

Make = Callable[..., RunConfig]


def shape(name: str = "meta-llama/Llama-2-7b-chat-hf") -> Shape:
    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(KNOWN[name]))


# -- architectures


@pytest.mark.parametrize(
    ("name", "weights", "tied"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616, False),
        ("meta-llama/Llama-2-13b-chat-hf", 13_015_864_320, False),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304, True),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, False),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, True),
    ],
)
def test_the_known_architectures_have_the_published_numbers_of_parameters(name: str, weights: int, tied: bool) -> None:
    found = shape(name)
    assert found.weights == weights
    assert found.multiplied == weights - (0 if tied else found.vocabulary * found.hidden)


def test_the_shape_of_llama_2_7b_by_hand() -> None:
    attention, mlp, norms = 4 * 4096 * 4096, 3 * 4096 * 11008, 2 * 4096
    assert shape() == Shape(
        weights=6_738_415_616, multiplied=6_607_343_616, layer=attention + mlp + norms, layers=32, hidden=4096,
        cache=2 * 32 * 4096, vocabulary=32000,
    )  # fmt: skip
    assert shape("Qwen/Qwen2.5-7B-Instruct").cache == 2 * 28 * 4 * 128  # four heads of keys and values


def test_every_known_architecture_has_its_own_model() -> None:
    assert {name.split("/")[1].lower().split("-")[0] for name in KNOWN} == {"llama", "qwen2.5", "smollm2"}


def test_a_local_folder_comes_before_the_list_of_known_models(make_config: Make, tmp_path: Path) -> None:
    config = KNOWN["Qwen/Qwen2.5-1.5B-Instruct"]
    config.save_pretrained(tmp_path / "mine")
    settings = make_config("model=hf", LLAMA_7B, small=False).model.model_copy(update={"local_path": tmp_path / "mine"})
    found, folder = architecture_of(settings)
    assert (found.hidden_size, folder) == (1536, tmp_path / "mine")


# -- formulas


def test_flops_by_hand() -> None:
    assert training_flops(7, 10, all_weights=True, recompute=False) == 6 * 7 * 10
    assert training_flops(7, 10, all_weights=False, recompute=False) == 4 * 7 * 10
    assert training_flops(7, 10, all_weights=True, recompute=True) == 8 * 7 * 10
    assert forward_flops(7, 10) == 2 * 7 * 10


FULL = dict(bytes_each=4, recompute=False, rows=1, length=1, adapters=0)


def test_full_training_in_fp32_takes_16_bytes_per_weight_before_activations() -> None:
    llama = shape()
    found = training_memory(llama, trained=llama.weights, mixed=False, shards=1, **FULL)
    assert found.weights == found.gradients == 4 * llama.weights and found.optimizer == 8 * llama.weights
    assert found.total - found.activations == 16 * llama.weights
    assert training_memory(llama, trained=llama.weights, mixed=True, shards=1, **FULL).copies == 2 * llama.multiplied


def test_a_vector_has_no_gradients_and_moments_but_its_own() -> None:
    llama = shape()
    found = training_memory(llama, trained=1000, mixed=False, shards=1, **FULL | {"adapters": 1000})
    assert (found.weights, found.gradients, found.optimizer) == (4 * (llama.weights + 1000), 4000, 8000)


def test_fsdp_shards_all_but_the_layers_at_work() -> None:
    small = Shape(weights=1100, multiplied=1000, layer=100, layers=10, hidden=4, cache=80, vocabulary=25)
    found = training_memory(small, trained=1100, mixed=False, shards=4, **FULL)
    assert (found.gradients, found.optimizer) == (1100, 2200)
    assert found.weights == 1100 + 4 * (100 + 2 * 100)  # its share, what is in no layer, and two layers


def test_activations_by_hand() -> None:
    small = Shape(weights=1100, multiplied=1000, layer=100, layers=10, hidden=4, cache=80, vocabulary=25)
    some = dict(trained=5, adapters=5, bytes_each=4, mixed=True, shards=1, rows=2, length=3)
    assert training_memory(small, recompute=False, **some).activations == 34 * 10 * 6 * 4 + 16 * 6 * 25
    assert training_memory(small, recompute=True, **some).activations == (2 * 10 + 34) * 6 * 4 + 16 * 6 * 25
    with_kl = training_memory(small, recompute=False, kl_rows=1, **some).activations
    assert with_kl == 34 * 10 * 9 * 4 + 16 * 6 * 25 + 32 * 3 * 25
    in_fp32 = training_memory(small, recompute=False, **some | {"mixed": False}).activations
    assert in_fp32 == 2 * 34 * 10 * 6 * 4 + 16 * 6 * 25
    assert training_memory(small, recompute=True, **some).copies == 2 * small.layer  # made anew layer by layer


def test_answers_need_the_cache_or_the_logits() -> None:
    small = Shape(weights=1100, multiplied=1000, layer=100, layers=10, hidden=4, cache=80, vocabulary=25)
    found = asking_memory(small, adapters=5, bytes_each=4, rows=2, length=3)
    assert (found.weights, found.activations) == (4 * 1105, 80 * 4 * 6)
    wordy = replace(small, vocabulary=1000)
    assert asking_memory(wordy, adapters=5, bytes_each=4, rows=2, length=3).activations == 8 * 6 * 1000


def test_steps_time_and_disk_by_hand() -> None:
    assert decode_steps(prompts=100, devices=3, batch_size=16, new_tokens=40) == 3 * 40  # 34 prompts in 3 batches
    assert checkpoint_bytes(10, 4) == 120
    a100 = GPUS["A100-80GB"]
    assert seconds(a100, 1, 0.4, {2: 312e12}, 0, 0) == pytest.approx(2.5)
    assert seconds(a100, 4, 0.4, {4: 19.5e12}, 10, 2039e9) == pytest.approx(0.625 + 10)


@pytest.mark.parametrize(("count", "said"), [(12, "12 B"), (49_152, "49.2 kB"), (26.95e9, "26.9 GB")])
def test_bytes_for_people(count: float, said: str) -> None:
    assert size(count) == said


@pytest.mark.parametrize(("time", "said"), [(1.25, "1.2 s"), (90, "1.5 min"), (5400, "1.5 h")])
def test_durations_for_people(time: float, said: str) -> None:
    assert duration(time) == said


# -- budgets of runs


def paper(make_config: Make, name: str, *overrides: str) -> Budget:
    return Budget.of(make_config(f"experiment=paper/{name}", *overrides, small=False))


def test_the_budget_of_harmbase_by_hand(make_config: Make) -> None:
    budget = paper(make_config, "harmbase")
    vector, finetune, infer = budget.works()
    whole, n = PROMPT_TOKENS + RESPONSE_TOKENS, 6_607_343_616
    assert vector.trained == 32 * 2 * 8 * (4096 + 4096) and finetune.trained == 6_738_415_616
    assert (vector.samples, vector.steps) == (100, 130) and (finetune.samples, finetune.steps) == (200, 65)
    kl = 130 * 8 * whole
    assert vector.tokens == 1000 * whole + kl
    assert vector.training == 4 * n * vector.tokens + 2 * n * kl
    probes = (65 // 20 + 2) * 2 * (6 + 2) * n * 32 * whole
    assert finetune.training == 6 * n * 5 * 200 * whole + probes
    assert infer.trained == 0 and infer.memory.weights == 4 * (2 * 6_738_415_616 + vector.trained)


def test_a_plain_fine_tune_has_neither_vector_nor_its_cost(make_config: Make) -> None:
    budget = paper(make_config, "harmbase", "defense=none", "telemetry.every_n_steps=0")
    assert budget.parts == {"backbone": 6_738_415_616}
    assert [work.stage for work in budget.works()] == ["finetune", "infer"]
    assert "vector" not in plan(budget.config)


def test_a_task_lora_costs_no_gradients_of_the_backbone(make_config: Make) -> None:
    budget = paper(make_config, "harmbase", "tune=lora", "telemetry.every_n_steps=0")
    finetune = budget.works()[1]
    assert finetune.training == 4 * 6_607_343_616 * finetune.tokens
    assert finetune.trained == budget.parts["task"] and finetune.frozen == 6_738_415_616 + budget.parts["vector"]


def test_accumulation_makes_fewer_steps(make_config: Make) -> None:
    work = paper(make_config, "harmbase", "trainer.accumulate_grad_batches=4").works()[1]
    assert work.steps == 5 * 4  # 13 batches an epoch


def test_the_tiny_model_is_measured_on_its_own_samples(make_config: Make) -> None:
    budget = Budget.of(make_config(small=False))
    assert 800_000 < budget.parts["backbone"] < 850_000 and budget.parts["vector"] == 3 * 2 * 8 * (128 + 128)
    assert all(0 < length.prompt < length.longest_prompt < 60 for length in budget.lengths.values())
    assert budget.works()[0].stage == "align (once)" and "own samples" in budget.notes[0]


# -- what is refused


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        (["vector.target_modules=[q_prj]"], ConfigError, ["'q_prj'", "mean 'q_proj'?", "down_proj, gate_proj, k_proj"]),
        (["tune=lora", "tune.lora.target_modules=[lm_head]"], ConfigError, ["lm_head", "embeddings"]),
        (["vector.layers=[0,3]"], ConfigError, ["vector.layers: [3]", "0 to 2"]),
        (["tune=lora", "tune.lora.layers=[-1]"], ConfigError, ["tune.lora.layers: [-1]", "0 to 2"]),
        (["evaluation.max_new_tokens=500"], ConfigError, ["max_new_tokens=500", "context of 512"]),
        (["trainer=ddp", "trainer.devices=16"], ConfigError, ["100 rows in batches of 16", "16 processes"]),
        (["model.align=null"], ConfigError, ["model.align"]),
        (["model=hf", "model.name_or_path=qwen/Qwen2.5-7B-Instruct"], ConfigError, ["'Qwen/Qwen2.5-7B-Instruct'?"]),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, list) and "=" in given[0] else "",
)
def test_what_the_run_would_refuse(
    overrides: list[str], error: type[SecVecError], says: list[str], make_config: Make
) -> None:
    with pytest.raises(error) as caught:
        plan(make_config(*overrides, small=False))
    assert caught.value.exit_code == 2
    assert [part for part in says if part not in str(caught.value)] == []


def test_too_few_rows_in_a_file_of_the_user(make_config: Make, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n')
    given = [f"behavior.{split}={file}" for split in ("vector", "finetune", "test")]
    with pytest.raises(DataError, match="1 rows for split 'finetune'"):
        plan(make_config("behavior=jsonl", *given, small=False))


# -- the whole


@pytest.mark.parametrize("name", ["demo", "smollm2", *(f"paper/{name}" for name in PAPER)])
def test_every_experiment_has_a_plan(name: str, make_config: Make) -> None:
    text = plan(make_config(f"experiment={name}", small=False))
    for heading in ("stages", "memory per device", "time by GPU", "disk", "assumed:"):
        assert f"\n{heading}" in text
    assert ("data are not at hand" in text) == name.startswith("paper")


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_protocol_fits_the_gpus_that_its_preset_names(name: str, make_config: Make) -> None:
    text = plan(make_config(f"experiment=paper/{name}", small=False))
    fits = {line.split()[0]: line.split()[1] for line in text.splitlines() if line.startswith("  A100-80GB")}
    assert "4 x gpu (fsdp, bf16-mixed)" in text and fits == {"A100-80GB": "yes"}


def train(folder: Path, *given: str) -> subprocess.CompletedProcess[str]:
    """`python train.py GIVEN` in an empty folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *given],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_the_command_prints_and_writes_nothing(tmp_path: Path) -> None:
    done = train(tmp_path, "+plan=true", "experiment=demo")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plan: tiny, vector -> finetune -> infer") and "memory per device" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_multirun_prints_every_job_s_plan_and_leaves_what_is_there(tmp_path: Path) -> None:
    record = tmp_path / "outputs" / "some" / "job" / "record.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    given = ["+plan=true", "sweep=some", "defense=none,security_vector", "vector.target_modules=[query]"]
    done = train(tmp_path, "-m", *given)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "\n# defense=none\nplan: tiny, finetune -> infer" in done.stdout
    assert "1 of 2 jobs would fail: defense=security_vector" in done.stderr and "it has down_proj" in done.stderr
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"record.json", "multirun.yaml"} and record.read_text() == "{}"  # the latter is Hydra's own


def test_a_search_has_no_plan(tmp_path: Path) -> None:
    done = train(tmp_path, "-m", "+plan=true", "experiment=ablation/attack")
    assert done.returncode == 2 and "does not know its trials beforehand" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_the_modules_that_there_are(tmp_path: Path) -> None:
    done = train(tmp_path, "plan=true", "experiment=paper/harmbase", "vector.target_modules=[q_proj,query]")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_fault_beside_a_nested_experiment_is_the_only_one_named(tmp_path: Path) -> None:
    done = train(tmp_path, "experiment=paper/harmbase", "sed=1")
    assert done.returncode == 2 and "sed=1: unknown key" in done.stderr and "paper/harmbase" not in done.stderr
