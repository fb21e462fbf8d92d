"""The cost of each stage of a run, from its settings, its model's sizes and the length of its samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from secvec.config.schema import RunConfig
from secvec.data.datamodule import GlobalBatchSampler
from secvec.errors import ConfigError
from secvec.models.backbone import context_of, ledger, load_tokenizer
from secvec.models.tiny import build_tiny
from secvec.models.vector import attach_new_vector, attach_task
from secvec.planning import flops as costs
from secvec.planning.architectures import load_architecture, shape_of
from secvec.planning.flops import Memory, Shape, TrainingStep, forward_flops, training_flops
from secvec.planning.lengths import Length, checked_data, is_local, measure, numbers_of, samples_of, tiny_words
from secvec.stages import STAGES
from secvec.stages.align import plan_align
from secvec.stages.base import Workload


@dataclass(frozen=True)
class StageCost:
    """What a stage computes, and its memory on the fullest device."""

    stage: str
    work: Workload
    memory: Memory
    frozen: int
    samples: int
    steps: int = 0
    tokens: float = 0
    training_flops: float = 0  # at the precision of training
    inference_flops: float = 0  # at the precision of the weights
    decode_steps: int = 0  # tokens that a device generates one after another
    devices: int = 1  # that train


@dataclass(frozen=True)
class Budget:
    """The costs of a run's stages."""

    config: RunConfig
    shape: Shape
    context: int
    parts: Mapping[str, int]
    """Parameters of backbone, vector, task."""
    lengths: Mapping[str, Length]
    """By kind: undesired, benign, test."""
    tests: int
    """Held-out prompts of all kinds together."""
    note: str
    """How the lengths were found."""
    numbers: Mapping[str, int]
    """Samples by use (`secvec.planning.lengths.numbers_of`)."""

    @classmethod
    def of(cls, config: RunConfig) -> Budget:
        """Builds the run's model without weights, and draws its samples if they are on this machine."""
        data = checked_data(config) if is_local(config) else None
        architecture, tokenizer = _skeleton(config, data is not None)
        context, kinds = context_of(architecture), {stream.kind for stream in config.data.streams}
        if data and tokenizer:
            data.fit_to(tokenizer, context, [*config.stages, "infer"])
        examples, numbers = samples_of(data, config.stages) if data else None, numbers_of(config, data)
        lengths, note = measure(examples, tokenizer, context)
        tests = len(examples["test"]) if examples else numbers["test"] * (1 + len(kinds))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=config.model.trust_remote_code)
            shape = shape_of(model)
            _check_layers(config, shape.num_layers - 1)
            if config.defense.uses_vector:
                model = attach_new_vector(model, config.vector, config.vector.dropout)
            if config.tune.lora:
                model = attach_task(model, config.tune.lora)
        parts = {row.part: row.parameters for row in ledger(model)}
        return cls(config, shape, context, parts, lengths, tests, note, numbers)

    @cached_property
    def devices(self) -> int:
        """On all nodes; `auto` counts the GPUs of this machine."""
        trainer = self.config.trainer
        here = 1 if trainer.accelerator == "cpu" else max(1, torch.cuda.device_count())
        return (here if trainer.devices == "auto" else trainer.devices) * trainer.num_nodes

    @property
    def _shards(self) -> int:
        """Devices that share the weights."""
        trainer = self.config.trainer
        return self.devices // trainer.replicas if trainer.strategy == "fsdp" else 1

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a weight."""
        return 8 if self.config.trainer.precision == "64-true" else 2 if self.config.model.dtype == "bfloat16" else 4

    @property
    def mixed(self) -> bool:
        """Whether fp32 weights are multiplied in 16 bits."""
        return self.config.trainer.precision in ("bf16-mixed", "16-mixed") and self.dtype_bytes == 4

    @property
    def compute_bytes(self) -> int:
        """Bytes of the numbers that training multiplies."""
        return 2 if self.mixed else self.dtype_bytes

    @property
    def adapters(self) -> int:
        """Parameters of vector and task LoRA."""
        return sum(n for part, n in self.parts.items() if part != "backbone")

    def check(self) -> None:
        """Raises ConfigError for answers that do not fit into the model's context."""
        new = self.config.evaluation.max_new_tokens
        longest = max((length.longest_prompt for length in self.lengths.values()), default=0)
        if longest + new > self.context or max(length.longest for length in self.lengths.values()) > self.context:
            raise ConfigError(
                f"evaluation.max_new_tokens={new} and prompts of up to {longest} tokens do not fit into the model's "
                f"context of {self.context}"
            )

    def stages(self) -> list[StageCost]:
        """The cost of each stage of the run, in order. Raises ConfigError for batches that the devices cannot share."""
        planned = {"align (once)": plan_align(self)} | {name: STAGES[name].plan(self) for name in self.config.stages}
        return [
            self._training(name, work) if work.trained else self._answers(name, work)
            for name, work in planned.items()
            if work
        ]

    def _answers(self, name: str, work: Workload) -> StageCost:
        """The cost of a stage that only answers."""
        shape = self.shape
        flops, steps, memory = self._inference(work.prompts)
        flops += forward_flops(shape.matmul_parameters, work.scored * self.lengths["test"].total)
        beside = (work.models - 1) * costs.held_weights(shape, 0, self._shards) * self.dtype_bytes
        memory = replace(memory, weights=memory.weights + beside)
        frozen = shape.parameters + self.adapters
        return StageCost(name, work, memory, frozen, self.tests, inference_flops=flops, decode_steps=steps)

    def _training(self, name: str, work: Workload) -> StageCost:
        """The cost of a stage that trains."""
        n, trainer, devices = self.shape.matmul_parameters, self.config.trainer, 1 if work.alone else self.devices
        full, recompute = work.trained >= self.shape.parameters, self.config.model.gradient_checkpointing
        samples = sum(work.samples.values())
        GlobalBatchSampler([samples], [work.batch_size], 0, 0, devices)  # refuses what the training would
        batches = ceil(samples / work.batch_size)
        steps = ceil(batches / (1 if work.alone else trainer.accumulate_grad_batches)) * work.epochs
        kl_tokens = work.epochs * batches * work.kl_batch_size * self.lengths["benign"].total
        row_tokens = sum(count * self.lengths[kind].total for kind, count in work.samples.items())
        tokens = work.epochs * row_tokens + kl_tokens
        flops = training_flops(n, tokens, full=full, recompute=recompute) + forward_flops(n, kl_tokens)
        if work.probe_every:
            flops += (steps // work.probe_every + 2) * self._probe_flops(full)
        rows, kl_rows = ceil(ceil(samples / batches) / devices), ceil(work.kl_batch_size / devices)
        step = TrainingStep(
            trained=work.trained,
            adapters=work.adapters,
            dtype_bytes=self.dtype_bytes,
            rows=rows,
            length=max(self.lengths[kind].longest for kind in [*work.samples, *["benign"] * bool(kl_rows)]),
            kl_rows=kl_rows,
            mixed=self.mixed,
            recompute=recompute,
            shards=1 if work.alone else self._shards,
        )
        memory, inference = costs.training_memory(self.shape, step), self._inference(work.prompts)[:2]
        frozen = self.shape.parameters + work.adapters - work.trained
        return StageCost(name, work, memory, frozen, samples, steps, tokens, flops, *inference, devices)

    @property
    def mixture(self) -> dict[str, int]:
        """Fine-tuning samples by kind."""
        return {kind: self.numbers[kind] for kind in ("undesired", "benign")}

    def _inference(self, prompts: int) -> tuple[float, int, Memory]:
        """FLOPs, decoding steps and memory of the answers to `prompts`, and of the loss on as many references."""
        evaluation, test, new = self.config.evaluation, self.lengths["test"], self.config.evaluation.max_new_tokens
        rows, length = min(evaluation.batch_size, self.tests), max(test.longest_prompt + new, test.longest)
        memory = costs.inference_memory(self.shape, self.adapters, self.dtype_bytes, rows, length, self._shards)
        steps = costs.decode_steps(prompts, self.devices, evaluation.batch_size, new)
        tokens = prompts * (test.prompt + new + test.total)
        return forward_flops(self.shape.matmul_parameters, tokens), steps, memory

    def _probe_flops(self, full: bool) -> float:
        """FLOPs of one probe of the telemetry: with the vector on and, where there is one, off."""
        n, states = self.shape.matmul_parameters, 2 if self.config.defense.uses_vector else 1
        undesired, benign = (
            min(self.config.telemetry.num_samples, count) * self.lengths[kind].total
            for kind, count in self.mixture.items()
        )
        gradient = training_flops(n, undesired, full=full, recompute=self.config.model.gradient_checkpointing)
        return states * (gradient + forward_flops(n, benign))


def _skeleton(config: RunConfig, local_data: bool) -> tuple[PretrainedConfig, PreTrainedTokenizerBase | None]:
    """The model's architecture, and its tokenizer where that is on this machine."""
    if config.model.name_or_path is None:
        tiny, tokenizer = build_tiny(tiny_words(config) if local_data else [], 0)
        return tiny.config, tokenizer
    architecture, folder = load_architecture(config.model)
    return architecture, load_tokenizer(folder, config.model.trust_remote_code) if folder else None


def _check_layers(config: RunConfig, last: int) -> None:
    """Raises ConfigError for layers that the model lacks; PEFT does so only when it lacks all of them."""
    vector = config.vector if config.defense.uses_vector else None
    for key, lora in (("vector", vector), ("tune.lora", config.tune.lora)):
        if beyond := [n for n in (lora.layers if lora else None) or [] if not 0 <= n <= last]:
            raise ConfigError(f"{key}.layers: {beyond} are out of range; the model has 0 to {last}")
