"""The plan before a run: its arithmetic by hand, what it refuses, and that it writes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_command
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from secvec.config.schema import RunConfig
from secvec.errors import ConfigError, DataError, SecVecError
from secvec.planning.architectures import KNOWN, load_architecture, shape_of
from secvec.planning.budget import Budget
from secvec.planning.flops import (
    GPUS,
    Shape,
    TrainingStep,
    checkpoint_bytes,
    compute_seconds,
    decode_seconds,
    decode_steps,
    forward_flops,
    inference_memory,
    training_flops,
    training_memory,
)
from secvec.planning.lengths import PROMPT_TOKENS, RESPONSE_TOKENS
from secvec.planning.table import duration, plan, size

LLAMA_7B = "model.name_or_path=meta-llama/Llama-2-7b-chat-hf"
PAPER = ["harmbase", "harmlarge", "hallucination"]
QWEN: dict[str, Any] = {"max_position_embeddings": 32768, "num_hidden_layers": 28}
CONFIGS = {
    **KNOWN,
    "meta-llama/Llama-2-13b-chat-hf": LlamaConfig(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": Qwen2Config(
        **QWEN, vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
        **QWEN, vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    ),
}  # fmt: skip

Make = Callable[..., RunConfig]


def shape(name: str = "meta-llama/Llama-2-7b-chat-hf") -> Shape:
    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(CONFIGS[name]))


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
    assert found.parameters == weights
    assert found.matmul_parameters == weights - (0 if tied else found.vocab_size * found.hidden_size)


def test_the_shape_of_llama_2_7b_by_hand() -> None:
    attention, mlp, norms = 4 * 4096 * 4096, 3 * 4096 * 11008, 2 * 4096
    assert shape() == Shape(
        parameters=6_738_415_616, matmul_parameters=6_607_343_616, layer_parameters=attention + mlp + norms,
        num_layers=32, hidden_size=4096, kv_size=2 * 32 * 4096, vocab_size=32000,
    )  # fmt: skip
    assert shape("Qwen/Qwen2.5-7B-Instruct").kv_size == 2 * 28 * 4 * 128  # four heads of keys and values


def test_the_models_of_our_experiments_are_known_offline(make_config: Make) -> None:
    experiments = ("smollm2", *(f"paper/{name}" for name in PAPER))
    assert {make_config(f"experiment={name}", small=False).model.name_or_path for name in experiments} == KNOWN.keys()


def test_a_local_folder_comes_before_the_list_of_known_models(make_config: Make, tmp_path: Path) -> None:
    config = CONFIGS["Qwen/Qwen2.5-1.5B-Instruct"]
    config.save_pretrained(tmp_path / "mine")
    settings = make_config("recipe=llm", LLAMA_7B, small=False).model.model_copy(
        update={"local_path": tmp_path / "mine"}
    )
    found, folder = load_architecture(settings)
    assert (found.hidden_size, folder) == (1536, tmp_path / "mine")


# -- formulas


def test_flops_by_hand() -> None:
    assert training_flops(7, 10, full=True, recompute=False) == 6 * 7 * 10
    assert training_flops(7, 10, full=False, recompute=False) == 4 * 7 * 10
    assert training_flops(7, 10, full=True, recompute=True) == 8 * 7 * 10
    assert forward_flops(7, 10) == 2 * 7 * 10


FULL = dict(dtype_bytes=4, rows=1, length=1, adapters=0)
SMALL = Shape(
    parameters=1100, matmul_parameters=1000, layer_parameters=100, num_layers=10, hidden_size=4, kv_size=80,
    vocab_size=25,
)  # fmt: skip


def test_full_training_in_fp32_takes_16_bytes_per_weight_before_activations() -> None:
    llama = shape()
    step = TrainingStep(trained=llama.parameters, **FULL)
    found = training_memory(llama, step)
    assert found.weights == found.gradients == 4 * llama.parameters and found.optimizer == 8 * llama.parameters
    assert found.total - found.activations == 16 * llama.parameters
    assert training_memory(llama, replace(step, mixed=True)).copies == 2 * llama.matmul_parameters


def test_a_vector_has_no_gradients_and_moments_but_its_own() -> None:
    llama = shape()
    found = training_memory(llama, TrainingStep(trained=1000, **FULL | {"adapters": 1000}))
    assert (found.weights, found.gradients, found.optimizer) == (4 * (llama.parameters + 1000), 4000, 8000)


def test_fsdp_shards_all_but_the_layers_at_work() -> None:
    found = training_memory(SMALL, TrainingStep(trained=1100, shards=4, **FULL))
    assert (found.gradients, found.optimizer) == (1100, 2200)
    assert found.weights == 1100 + 4 * (100 + 2 * 100)  # its share, what is in no layer, and two layers


def test_activations_by_hand() -> None:
    step = TrainingStep(trained=5, adapters=5, dtype_bytes=4, mixed=True, rows=2, length=3)
    recomputed = replace(step, recompute=True)
    assert training_memory(SMALL, step).activations == 34 * 10 * 6 * 4 + 16 * 6 * 25
    assert training_memory(SMALL, recomputed).activations == (2 * 10 + 34) * 6 * 4 + 16 * 6 * 25
    with_kl = training_memory(SMALL, replace(step, kl_rows=1)).activations
    assert with_kl == 34 * 10 * 9 * 4 + 16 * 6 * 25 + 32 * 3 * 25
    in_fp32 = training_memory(SMALL, replace(step, mixed=False)).activations
    assert in_fp32 == 2 * 34 * 10 * 6 * 4 + 16 * 6 * 25
    assert training_memory(SMALL, recomputed).copies == 2 * SMALL.layer_parameters  # made anew layer by layer


def test_answers_need_the_cache_or_the_logits() -> None:
    found = inference_memory(SMALL, adapters=5, dtype_bytes=4, rows=2, length=3)
    assert (found.weights, found.activations) == (4 * 1105, 80 * 4 * 6)
    wordy = replace(SMALL, vocab_size=1000)
    assert inference_memory(wordy, adapters=5, dtype_bytes=4, rows=2, length=3).activations == 8 * 6 * 1000


def test_steps_time_and_disk_by_hand() -> None:
    assert decode_steps(prompts=100, devices=3, batch_size=16, new_tokens=40) == 3 * 40  # 34 prompts in 3 batches
    assert checkpoint_bytes(10, 4) == 120
    a100 = GPUS["A100-80GB"]
    assert compute_seconds(a100, 312e12, dtype_bytes=2, devices=1, mfu=0.4) == pytest.approx(2.5)
    assert compute_seconds(a100, 19.5e12, dtype_bytes=4, devices=4, mfu=0.4) == pytest.approx(0.625)
    assert decode_seconds(a100, steps=10, weight_bytes=2039e9) == pytest.approx(10)


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
    vector, finetune, infer = budget.stages()
    whole, n = PROMPT_TOKENS + RESPONSE_TOKENS, 6_607_343_616
    assert vector.work.trained == 32 * 2 * 8 * (4096 + 4096) and finetune.work.trained == 6_738_415_616
    assert (vector.samples, vector.steps) == (100, 130) and (finetune.samples, finetune.steps) == (200, 65)
    kl = 130 * 8 * whole
    assert vector.tokens == 1000 * whole + kl
    assert vector.training_flops == 4 * n * vector.tokens + 2 * n * kl
    probes = (65 // 20 + 2) * 2 * (6 + 2) * n * 32 * whole
    assert finetune.training_flops == 6 * n * 5 * 200 * whole + probes
    assert infer.work.trained == 0
    # two models in four shards each; of each two layers, the two embeddings and the last norm whole
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    held = 6_738_415_616 / 4 + 2 * layer + 2 * 32000 * 4096 + 4096
    assert infer.memory.weights == 4 * (2 * held + vector.work.trained / 4)


def test_a_plain_fine_tune_has_neither_vector_nor_its_cost(make_config: Make) -> None:
    budget = paper(make_config, "harmbase", "defense=none", "telemetry.every_n_steps=0")
    assert budget.parts == {"backbone": 6_738_415_616}
    assert [cost.stage for cost in budget.stages()] == ["finetune", "infer"]
    assert "vector" not in plan(budget.config)


def test_a_task_lora_costs_no_gradients_of_the_backbone(make_config: Make) -> None:
    budget = paper(make_config, "harmbase", "tune=lora", "telemetry.every_n_steps=0")
    finetune = budget.stages()[1]
    assert finetune.training_flops == 4 * 6_607_343_616 * finetune.tokens
    assert finetune.work.trained == budget.parts["task"] and finetune.frozen == 6_738_415_616 + budget.parts["vector"]


def test_accumulation_makes_fewer_steps(make_config: Make) -> None:
    work = paper(make_config, "harmbase", "trainer.accumulate_grad_batches=4").stages()[1]
    assert work.steps == 5 * 4  # 13 batches an epoch


def test_the_alignment_does_not_accumulate(make_config: Make) -> None:
    plain, accumulated = (
        Budget.of(make_config(f"trainer.accumulate_grad_batches={n}", small=False)).stages() for n in (1, 4)
    )
    assert plain[0] == accumulated[0] and plain[1].steps > accumulated[1].steps


def test_the_tiny_model_is_measured_on_its_own_samples(make_config: Make) -> None:
    budget = Budget.of(make_config(small=False))
    assert 800_000 < budget.parts["backbone"] < 850_000 and budget.parts["vector"] == 3 * 2 * 8 * (128 + 128)
    assert all(0 < length.prompt < length.longest_prompt < 60 for length in budget.lengths.values())
    assert budget.stages()[0].stage == "align (once)" and "own samples" in budget.note


# -- what is refused


@pytest.mark.parametrize(
    ("overrides", "error", "says"),
    [
        (["vector.target_modules=[q_prj]"], ConfigError, ["'q_prj'", "mean 'q_proj'?", "down_proj, gate_proj, k_proj"]),
        (["tune=lora", "tune.lora.target_modules=[lm_head]"], ConfigError, ["lm_head", "embeddings"]),
        (["vector.layers=[0,3]"], ConfigError, ["vector.layers: [3]", "0 to 2"]),
        (["tune=lora", "tune.lora.layers=[-1]"], ConfigError, ["tune.lora.layers: [-1]", "0 to 2"]),
        (["evaluation.max_new_tokens=500"], DataError, ["max_new_tokens=500", "context of 512"]),
        (["trainer=ddp", "trainer.devices=16"], ConfigError, ["100 rows in batches of 16", "16 processes"]),
        (["model.align=null"], ConfigError, ["model.align"]),
        (
            ["recipe=llm", LLAMA_7B.replace("meta-llama", "metallama")],
            ConfigError,
            ["'meta-llama/Llama-2-7b-chat-hf'?"],
        ),
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
    with pytest.raises(ConfigError, match="1 rows for split 'finetune'"):
        plan(make_config("behavior=jsonl", "judge=none", *given, small=False))


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


def test_the_command_prints_and_writes_nothing(tmp_path: Path) -> None:
    done = run_command("train.py", "+plan=true", "experiment=demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plan: tiny, vector -> finetune -> infer") and "memory per device" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow  # each job imports everything anew; what a launcher does with plans is in test_multirun.py
def test_a_multirun_prints_every_job_s_plan_and_leaves_what_is_there(tmp_path: Path) -> None:
    record = tmp_path / "outputs" / "some" / "job" / "record.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    given = ["+plan=true", "sweep=some", "defense=none,security_vector", "vector.target_modules=[query]"]
    done = run_command("train.py", "-m", *given, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "\n# defense=none\nplan: tiny, finetune -> infer" in done.stdout
    assert "1 of 2 jobs would fail: defense=security_vector" in done.stderr and "it has down_proj" in done.stderr
    files = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"record.json", "multirun.yaml"} and record.read_text() == "{}"  # the latter is Hydra's own


def test_a_search_has_no_plan(tmp_path: Path) -> None:
    done = run_command("train.py", "-m", "+plan=true", "experiment=ablation/attack", cwd=tmp_path)
    assert done.returncode == 2 and "does not know its trials beforehand" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_the_modules_that_there_are(tmp_path: Path) -> None:
    done = run_command(
        "train.py", "plan=true", "experiment=paper/harmbase", "vector.target_modules=[q_proj,query]", cwd=tmp_path
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_fault_beside_a_nested_experiment_is_the_only_one_named(tmp_path: Path) -> None:
    done = run_command("train.py", "experiment=paper/harmbase", "sed=1", cwd=tmp_path)
    assert done.returncode == 2 and "sed=1: unknown key" in done.stderr and "paper/harmbase" not in done.stderr
