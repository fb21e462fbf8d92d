"""The plan before a run: its arithmetic by hand, what it refuses, and that it writes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import run_command
from configs import CHOICES
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from secvec.config.schema import RunConfig
from secvec.data.batch import Encoded, collate
from secvec.errors import ConfigError, DataError, SecVecError
from secvec.models.backbone import ledger, load_backbone, prepared, set_trainable
from secvec.planning.architectures import KNOWN, load_architecture, shape_of, with_layers
from secvec.planning.budget import Budget
from secvec.planning.flops import (
    GPUS,
    Shape,
    answer_bytes,
    checkpoint_bytes,
    compute_seconds,
    decode_seconds,
    decode_steps,
    forward_flops,
    gathered,
)
from secvec.planning.lengths import PROMPT_TOKENS, RESPONSE_TOKENS
from secvec.planning.step import Step, count_step, planned_step
from secvec.planning.table import duration, plan, size
from secvec.stages import STAGES
from secvec.stages.base import Workload
from secvec.training.trainer import precision_on_cpu

LLAMA_7B = "model.name_or_path=meta-llama/Llama-2-7b-chat-hf"
KNOWN_SIZES = {"13b": 13_015_864_320, "70b": 68_976_648_192}
PAPER = ["harmbase", "harmlarge", "hallucination"]
QWEN: dict[str, Any] = {"max_position_embeddings": 32768, "num_hidden_layers": 28}
CONFIGS = {
    **KNOWN,
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
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def shape(name: str = "meta-llama/Llama-2-7b-chat-hf") -> Shape:
    with torch.device("meta"):
        return shape_of(AutoModelForCausalLM.from_config(CONFIGS[name]))


# -- architectures


@pytest.mark.parametrize(
    ("name", "weights", "tied"),
    [
        ("meta-llama/Llama-2-7b-chat-hf", 6_738_415_616, False),
        ("meta-llama/Llama-2-13b-chat-hf", 13_015_864_320, False),
        ("meta-llama/Llama-2-70b-chat-hf", 68_976_648_192, False),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304, True),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512, False),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008, True),
    ],
)
def test_the_known_architectures_have_the_published_numbers_of_parameters(name: str, weights: int, tied: bool) -> None:
    found = shape(name)
    assert found.parameters == weights
    assert found.inner_parameters == weights - (1 if tied else 2) * found.head_parameters


def test_the_shape_of_llama_2_7b_by_hand() -> None:
    attention, mlp, norms = 4 * 4096 * 4096, 3 * 4096 * 11008, 2 * 4096
    assert shape() == Shape(
        parameters=6_738_415_616, head_parameters=32000 * 4096, inner_parameters=6_476_271_616,
        layer_parameters=attention + mlp + norms, num_layers=32, kv_size=2 * 32 * 4096, vocab_size=32000,
    )  # fmt: skip
    assert shape("Qwen/Qwen2.5-7B-Instruct").kv_size == 2 * 28 * 4 * 128  # four heads of keys and values


def test_the_models_of_our_experiments_are_known_offline(make_config: Make) -> None:
    experiments = ("smollm2", *(f"paper/{name}" for name in PAPER))
    assert {make_config(f"experiment={name}", small=False).model.name_or_path for name in experiments} <= KNOWN.keys()


def test_a_local_folder_comes_before_the_list_of_known_models(make_config: Make, tmp_path: Path) -> None:
    config = CONFIGS["Qwen/Qwen2.5-1.5B-Instruct"]
    config.save_pretrained(tmp_path / "mine")
    settings = make_config("recipe=llm", LLAMA_7B, small=False).model.model_copy(
        update={"local_path": tmp_path / "mine"}
    )
    found, folder = load_architecture(settings)
    assert (found.hidden_size, folder) == (1536, tmp_path / "mine")


# -- one training step, without values and with them

TINY = LlamaConfig(
    vocab_size=500, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
ROWS = [(Encoded(list(range(3, 30 + 4 * i)), 8 + i), i > 4) for i in range(8)]


def planned(config: RunConfig, stage: str, architecture: PretrainedConfig = TINY, shards: int = 1) -> Step:
    """The step on tensors without values."""
    work, settings = workload(config, stage), (config.model, config.optimizer, config.trainer)
    return planned_step(*settings, architecture, work, collate(ROWS), shards)


def workload(config: RunConfig, stage: str) -> Workload:
    parts = {"vector": 1, "backbone": 1} | ({"task": 1} if config.tune.lora else {})
    numbers = dict.fromkeys(("vector", "gate", "undesired", "benign"), 1)
    budget: Any = SimpleNamespace(config=config, parts=parts, numbers=numbers, tests=1, adapters=1, mixture={})
    return STAGES[stage].plan(budget)


class Real:
    """The same step of a model that has values."""

    def __init__(self, config: RunConfig, stage: str, architecture: PretrainedConfig = TINY, loaded: Any = None):
        work, self.batch = workload(config, stage), collate(ROWS)
        self.precision = precision_on_cpu(config.trainer.precision)
        with torch.random.fork_rng(devices=[]):
            dtype = getattr(torch, config.model.dtype)
            model = loaded or prepared(AutoModelForCausalLM.from_config(architecture, dtype=dtype), config.model)
            model = work.attach(model)
        self.model = self.precision.convert_module(model).train()
        set_trainable(self.model, work.part)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], foreach=False)
        self.of_stage = work.loss

    def loss(self) -> torch.Tensor:
        with self.precision.forward_context():
            return self.of_stage(self.model, self.batch)["loss"]

    def twice(self) -> None:
        """Two steps in Lightning's order."""
        for _ in range(2):
            loss = self.loss()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            del loss


WAYS = {
    "finetune": ["model.gradient_checkpointing=true", "tune=lora", "defense=none", "model.packing=false"],
    "vector": ["model.gradient_checkpointing=true", "vector.kl_weight=0"],
}
BOTH = ["trainer=cpu", "trainer.precision=bf16-mixed", "trainer.precision=bf16-true", "trainer.precision=64-true"]


@pytest.mark.parametrize(
    ("stage", "override"), [(stage, override) for stage in WAYS for override in BOTH + WAYS[stage]]
)
def test_a_planned_step_is_the_real_one(stage: str, override: str, make_config: Make) -> None:
    config = make_config(override)
    found, real = planned(config, stage), Real(config, stage)
    assert found == count_step(real.model, real.optimizer, real.loss)
    # and by torch's own instruments
    with FlopCounterMode(display=False) as flops:
        real.twice()
    assert 2 * found.flops == flops.get_total_flops() > 0
    assert found.peak.total == pytest.approx(peak_bytes(Real(config, stage)), rel=0.05)


OTHERS: list[PretrainedConfig] = [
    GPT2Config(vocab_size=500, n_embd=32, n_layer=2, n_head=2, n_positions=128),
    Gemma2Config(
        vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
    ),
]  # fmt: skip
"""Layers of another kind (Conv1D, tied embeddings, dropout), and one that cannot be packed."""


@pytest.mark.parametrize("architecture", OTHERS, ids=lambda architecture: architecture.model_type)
def test_a_planned_step_of_another_family(architecture: PretrainedConfig, make_config: Make) -> None:
    config = make_config("vector.target_modules=all-linear")
    real = Real(config, "finetune", architecture)
    assert planned(config, "finetune", architecture) == count_step(real.model, real.optimizer, real.loss)


def test_a_model_whose_step_needs_values_has_no_plan(make_config: Make) -> None:
    experts = MixtralConfig(
        vocab_size=500, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=128,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="a step of mixtral cannot be counted on fake tensors"):
        planned(make_config("vector.target_modules=[q_proj]"), "finetune", experts)


def peak_bytes(real: Real) -> float:
    """The most that the allocator gave out in two steps, and what was there before."""
    before = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in real.model.parameters()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        real.twice()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    return sum(before.values()) + max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


@pytest.mark.parametrize("override", ["trainer=cpu", "model.gradient_checkpointing=true"])
def test_each_layer_adds_the_same(override: str, make_config: Make) -> None:
    config = make_config(override)
    two, four, nine = (planned(config, "finetune", with_layers(TINY, n)) for n in (2, 4, 9))
    assert four.deeper(two, 2.5).flops == nine.flops > four.flops
    assert four.deeper(two, 2.5).peak.total == pytest.approx(nine.peak.total, rel=0.01)


def test_shards_divide_weights_gradients_and_moments(make_config: Make) -> None:
    config = make_config()
    whole, quarter = planned(config, "finetune"), planned(config, "finetune", shards=4)
    assert quarter.forward.weights == whole.forward.weights / 4 > 0
    assert quarter.optimizer.gradients == whole.optimizer.gradients / 4 > 0
    assert quarter.forward.optimizer == whole.forward.optimizer / 4 > 0
    assert quarter.forward.activations == whole.forward.activations
    assert quarter.optimizer.activations < whole.optimizer.activations


def test_accumulated_gradients_stay_during_the_backward_pass(make_config: Make) -> None:
    once, twice = (planned(make_config(f"trainer.accumulate_grad_batches={n}"), "finetune") for n in (1, 2))
    assert once.forward == twice.forward and once.backward.total < twice.backward.total


def test_on_a_gpu_the_optimizer_works_on_all_weights_at_once(make_config: Make) -> None:
    ways = ["trainer=cpu"], ["trainer=gpu"], ["trainer=gpu", "optimizer=adamw_fused"]
    cpu, gpu, fused = (planned(make_config(*way), "finetune") for way in ways)
    assert fused.optimizer.activations < cpu.optimizer.activations < gpu.optimizer.activations
    assert gpu.optimizer.activations >= gpu.optimizer.gradients


@pytest.mark.parametrize("defense", [choice.name for choice in CHOICES if choice.parent.name == "defense"])
def test_every_defense_has_a_step(defense: str, make_config: Make) -> None:
    assert planned(make_config(f"defense={defense}"), "finetune").flops > 0


def test_the_longest_step_is_planned(make_config: Make) -> None:
    """Also where the anchor is read in every third step only."""
    plain, seldom, always = (
        planned(make_config(*given), "finetune").flops
        for given in (["defense=none"], ["defense=anchored_vector", "defense.every=3"], ["defense=anchored_vector"])
    )
    assert plain < seldom == always


def in_4_bits(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"model": config.model.model_copy(update={"quantization": "nf4"})})


def test_weights_in_4_bits_by_hand(make_config: Make) -> None:
    """arXiv 2305.14314: with double quantization 4.127 bits a weight. The output head and the embeddings stay whole."""
    config = make_config("tune=lora", "defense.activation=adapter")
    whole, few = planned(config, "finetune"), planned(in_4_bits(config), "finetune")
    linear = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 80)
    assert whole.forward.weights - few.forward.weights == pytest.approx(linear * (4 - 4.127 / 8), rel=1e-5)
    assert few.flops == whole.flops and few.optimizer.optimizer == whole.optimizer.optimizer > 0
    assert few.backward.activations - whole.backward.activations == 80 * 32 * 4  # a weight of the MLP is made whole
    with pytest.raises(ConfigError, match="the weights are in 4 bits"):  # as in the run
        planned(in_4_bits(make_config("tune=lora", "defense.activation=merged")), "finetune")


@needs_bitsandbytes
@pytest.mark.parametrize("stage", ["vector", "finetune"])
def test_a_planned_step_in_4_bits_is_the_real_one(stage: str, make_config: Make, tmp_path: Path) -> None:
    """Of a model whose weights are most of it: bitsandbytes makes tables of its own for each of them."""
    size = {"vocab_size": 500, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4}
    architecture = LlamaConfig(**size, num_attention_heads=4, max_position_embeddings=128)
    AutoModelForCausalLM.from_config(architecture).save_pretrained(tmp_path)
    config = in_4_bits(make_config("tune=lora"))
    real = Real(config, stage, architecture, load_backbone(tmp_path, config.model))
    assert planned(config, stage, architecture).peak.total == pytest.approx(peak_bytes(real), rel=0.1)


# -- formulas

SMALL = Shape(
    parameters=1100, head_parameters=100, inner_parameters=900, layer_parameters=90, num_layers=10, kv_size=80,
    vocab_size=25,
)  # fmt: skip


def test_answers_by_hand() -> None:
    assert forward_flops(SMALL, 10, 3) == 2 * (900 * 10 + 100 * 3)
    assert answer_bytes(SMALL, dtype_bytes=4, rows=2, length=3, logits=2) == 80 * 4 * 6
    assert answer_bytes(replace(SMALL, vocab_size=1000), dtype_bytes=4, rows=2, length=3, logits=2) == 8 * 2 * 1000
    assert gathered(SMALL, 4) == 200 + 2 * 90 and gathered(SMALL, 1) == 0


def test_steps_time_and_disk_by_hand() -> None:
    assert decode_steps(prompts=100, devices=3, batch_size=16, new_tokens=40) == 3 * 40  # 34 prompts in 3 batches
    assert [checkpoint_bytes(10, 4, keeps) for keeps in (False, True)] == [120, 160]
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
    budget = paper(make_config, "harmbase", "telemetry.every_n_steps=0")
    vector, finetune, infer = budget.stages()
    whole = PROMPT_TOKENS + RESPONSE_TOKENS
    inner, head = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32000 * 4096
    assert vector.work.trained == 32 * 2 * 8 * (4096 + 4096) and finetune.work.trained == 6_738_415_616
    assert (vector.samples, vector.steps) == (100, 130) and (finetune.samples, finetune.steps) == (200, 65)
    assert vector.tokens == (1000 + 130 * 8) * whole and finetune.tokens == 5 * 200 * whole
    scores = 4 * whole * 4096 * 32  # of a token, forward; backward 2.5 times as many
    trained = 6 * (inner * finetune.tokens + head * 1000 * RESPONSE_TOKENS) + 3.5 * scores * finetune.tokens
    assert finetune.training_flops == pytest.approx(trained, rel=0.01)  # the vector's B A is not in it
    kl, logits = 130 * 8 * whole, 1000 * RESPONSE_TOKENS + 130 * 8 * whole
    forward = 2 * (inner * (vector.tokens + kl) + head * (logits + kl)) + scores * (vector.tokens + kl)
    backward = 2 * (inner * vector.tokens + head * logits) + 2.5 * scores * vector.tokens
    assert vector.training_flops == pytest.approx(forward + backward, rel=0.01)
    # one model in four shards; two layers, the two embeddings and the last norm whole
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    held = 6_738_415_616 / 4 + 2 * layer + 2 * 32000 * 4096 + 4096
    assert infer.work.trained == 0 and infer.memory.weights == 4 * (held + vector.work.trained / 4)


def test_probes_add_to_the_fine_tune(make_config: Make) -> None:
    plain, probed = (
        paper(make_config, "harmbase", f"telemetry.every_n_steps={n}").stages()[1].training_flops for n in (0, 20)
    )
    probes = (65 // 20 + 2) * 2 * 32  # with the vector and without, on 32 rows of each kind
    assert probed - plain == pytest.approx(probes * plain / 1000 * (1 + 1 / 3), rel=0.05)


def test_full_training_in_fp32_takes_16_bytes_per_weight_beside_activations(make_config: Make) -> None:
    given = ["trainer=cpu", "trainer.devices=1", "trainer.precision=32-true", "defense=none"]
    memory = paper(make_config, "harmbase", *given).stages()[0].memory
    assert memory.weights == pytest.approx(4 * 6_738_415_616) and memory.gradients == pytest.approx(4 * 6_738_415_616)
    assert memory.optimizer == pytest.approx(8 * 6_738_415_616)


@pytest.mark.parametrize(("size", "nodes", "devices"), [("13b", 1, 8), ("70b", 8, 8)])
def test_larger_models_on_more_devices(size: str, nodes: int, devices: int, make_config: Make) -> None:
    model = f"model.name_or_path=meta-llama/Llama-2-{size}-chat-hf"
    where = ["trainer=fsdp", f"trainer.devices={devices}", f"trainer.num_nodes={nodes}", "finetune.batch_size=80"]
    vector, finetune, _ = paper(make_config, "harmlarge", model, *where, "vector.batch_size=100").stages()
    weights = KNOWN_SIZES[size]
    assert finetune.devices == vector.devices == nodes * devices and finetune.work.trained == weights
    assert finetune.memory.optimizer == pytest.approx(8 * weights / (nodes * devices), rel=1e-3)


def test_a_plain_fine_tune_has_neither_vector_nor_its_cost(make_config: Make) -> None:
    budget = paper(make_config, "harmbase", "defense=none", "telemetry.every_n_steps=0")
    assert budget.parts == {"backbone": 6_738_415_616}
    assert [cost.stage for cost in budget.stages()] == ["finetune", "infer"]
    assert "vector" not in plan(budget.config)


def test_a_task_lora_costs_no_gradients_of_the_backbone(make_config: Make) -> None:
    budget = paper(make_config, "harmbase", "tune=lora", "telemetry.every_n_steps=0")
    finetune = budget.stages()[1]
    full = paper(make_config, "harmbase", "telemetry.every_n_steps=0").stages()[1]
    assert 0.66 < finetune.training_flops / full.training_flops < 0.7 and finetune.memory.gradients < 1e8
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


@pytest.mark.parametrize("given", [["defense=none"], ["stage=infer"]])
def test_no_vector_is_counted_where_none_is_trained(given: list[str], make_config: Make, tmp_path: Path) -> None:
    """All its counts are null by default with `data=untrusted`."""
    for name in ("bad", "mine"):
        rows = [{"prompt": f"{name} {n}", "response": "b"} for n in range(600)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = ["behavior=jsonl", *(f"behavior.{n}={tmp_path / 'bad.jsonl'}" for n in ("file", "align")), "data=untrusted"]
    files += [f"data.file={tmp_path / 'mine.jsonl'}", "judge=none"]
    assert "plan: tiny" in plan(make_config(*files, *given, "model.align.num_undesired=20", small=False))


# -- the whole


@pytest.mark.parametrize("name", ["demo", "smollm2", *(f"paper/{name}" for name in PAPER)])
def test_every_experiment_has_a_plan(name: str, make_config: Make) -> None:
    text = plan(make_config(f"experiment={name}", small=False))
    for heading in ("stages", "memory per device", "time by GPU", "disk", "assumed:"):
        assert f"\n{heading}" in text
    assert ("the data are not on this machine" in text) == name.startswith("paper")


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


@pytest.mark.parametrize("defense", ["security_vector", "negated_vector", "safe_lora", "scan_filter", "anchor"])
def test_a_vector_that_does_not_act_has_no_part_in_the_step(defense: str, make_config: Make) -> None:
    """It was planned as an active one, with the memory of merged weights."""
    config = make_config(f"defense={defense}")
    acts = defense == "security_vector"
    model = workload(config, "finetune").attach(AutoModelForCausalLM.from_config(TINY))
    assert [row.part for row in ledger(model)] == ["backbone", "vector"][: 1 + acts]
    assert acts or config.defense.attach(model, None) is model
    assert workload(config, "finetune").adapters == acts


@pytest.mark.parametrize(
    ("given", "steps"),
    [("max_steps=3", 3), ("max_epochs=1", 3), ("limit_train_batches=1", 3), ("limit_train_batches=0.5", 3),
     ("fast_dev_run=2", 2), ("max_steps=100", 9)],
)  # fmt: skip
def test_a_shortened_training_is_planned_as_short(given: str, steps: int, make_config: Make) -> None:
    full = ["defense=none", "data.num_harmful=24", "data.num_benign=24", "finetune.batch_size=16", "finetune.epochs=3"]
    costs = [Budget.of(make_config(*full, *more)).stages()[-2] for more in ([], [f"trainer.{given}"])]
    assert [cost.stage for cost in costs] == ["finetune", "finetune"]
    whole, short = costs
    assert (whole.steps, short.steps) == (9, steps) and short.tokens == pytest.approx(whole.tokens * steps / 9, abs=1)
