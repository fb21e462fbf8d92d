"""The cost of each stage of a run, from its settings, its model's sizes and the length of its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import cycle, islice
from math import ceil
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from secvec.config.schema import RunConfig
from secvec.data.batch import Encoded, collate
from secvec.data.datamodule import GlobalBatchSampler, SecVecDataModule, limited
from secvec.errors import ConfigError
from secvec.models.backbone import context_of, ledger, load_tokenizer
from secvec.models.tiny import build_tiny
from secvec.models.vector import attach_new_vector, attach_task
from secvec.planning.architectures import alike, load_architecture, shape_of, with_layers
from secvec.planning.flops import Shape, answer_bytes, decode_steps, forward_flops, gathered
from secvec.planning.lengths import Length, measure, numbers_of, samples_of
from secvec.planning.step import Memory, Step, planned_step
from secvec.settings.schema import LoraSettings
from secvec.stages import STAGES
from secvec.stages.align import align_examples, plan_align, tiny_texts, tiny_unaligned
from secvec.stages.base import Workload

DEPTHS = (2, 4)
"""Layers of the models whose steps are counted; more of the same layers add the difference."""
Row = tuple[Encoded, bool]
"""A row of a batch, and whether it is an extra one."""


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
    architecture: PretrainedConfig
    alike: bool
    """Whether all layers have the same weights and adapters."""
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
        data = SecVecDataModule.of(config)
        if local := data.is_local:
            data.check(dict.fromkeys((*config.stages, "finetune")))
        architecture, tokenizer = _skeleton(config, local)
        context, kinds = context_of(architecture), {stream.kind for stream in config.data.streams}
        if local and tokenizer:
            data.fit_to(tokenizer, context, [*config.stages, "infer"])
        examples, numbers = samples_of(data, config.stages) if local else None, numbers_of(data, config.stages)
        lengths, note = measure(examples, tokenizer, context)
        tests = len(examples["test"]) if examples else numbers["test"] * (1 + len(kinds))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=config.model.trust_remote_code)
            shape = shape_of(model)
            vector = config.vector if config.defense.uses_vector else None
            _check_layers({"vector": vector, "tune.lora": config.tune.lora}, shape.num_layers - 1)
            if vector:
                model = attach_new_vector(model, vector, vector.dropout)
            if config.tune.lora:
                model = attach_task(model, config.tune.lora)
        parts = {row.part: row.parameters for row in ledger(model)}
        return cls(config, architecture, alike(model), shape, context, parts, lengths, tests, note, numbers)

    @cached_property
    def devices(self) -> int:
        """On all nodes; `auto` counts the GPUs of this machine."""
        trainer = self.config.trainer
        here = 1 if trainer.accelerator == "cpu" else max(1, torch.cuda.device_count())
        return (trainer.num_processes or here) * trainer.num_nodes

    @property
    def _shards(self) -> int:
        """Devices that share the weights."""
        trainer = self.config.trainer
        return self.devices // trainer.replicas if trainer.strategy == "fsdp" else 1

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a weight."""
        precision, half = self.config.trainer.precision, self.config.model.dtype == "bfloat16"
        return 8 if precision == "64-true" else 2 if half or precision == "bf16-true" else 4

    @property
    def compute_bytes(self) -> int:
        """Bytes of the numbers that training multiplies."""
        return 2 if self.config.trainer.precision in ("bf16-mixed", "16-mixed") else self.dtype_bytes

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
        test = self.lengths["test"]
        flops, steps, answers = self._inference(work.prompts)
        flops += forward_flops(self.shape, work.scored * (test.prompt + test.response), work.scored * test.response)
        weights = self.shape.parameters / self._shards + gathered(self.shape, self._shards)
        memory = Memory((weights + self.adapters / self._shards) * self.dtype_bytes, activations=answers)
        frozen = self.shape.parameters + self.adapters
        return StageCost(name, work, memory, frozen, self.tests, inference_flops=flops, decode_steps=steps)

    def _training(self, name: str, work: Workload) -> StageCost:
        """The cost of a stage that trains."""
        devices, samples = 1 if work.on_one_device else self.devices, sum(work.samples.values())
        accumulated = 1 if work.on_one_device else self.config.trainer.accumulate_grad_batches
        streams = self._streams(work)
        sizes, batch_sizes = [len(rows) for rows, _ in streams], [size for _, size in streams]
        GlobalBatchSampler(sizes, batch_sizes, 0, 0, devices, accumulated)  # refuses what the training would
        sampler = GlobalBatchSampler(sizes, batch_sizes, self.config.seed, accumulate=accumulated)
        rows = [row for stream, _ in streams for row in stream]
        batches = [[rows[i] for i in batch[rank::devices]] for batch in sampler for rank in range(devices)]
        tokens, fullest = sum(map(_tokens, batches)), max(batches, key=_tokens)
        step = self._step(work, fullest)
        per_token, steps = step.flops / _tokens(fullest), self._steps(work, sampler)
        tokens = round(tokens * steps / sampler.steps)  # of all epochs
        flops = per_token * tokens
        if work.probe_every:
            flops += (steps // work.probe_every + 2) * self._probe_flops(per_token)
        inference, frozen = self._inference(work.prompts)[:2], self.shape.parameters + work.adapters - work.trained
        return StageCost(name, work, step.peak, frozen, samples, steps, tokens, flops, *inference, devices)

    def _steps(self, work: Workload, sampler: GlobalBatchSampler) -> int:
        """Optimizer steps of all epochs, as the Trainer's own limits leave them."""
        if work.on_one_device:
            return sampler.steps * work.epochs
        trainer = self.config.trainer
        given: dict[str, Any] = trainer.model_extra or {}
        limit, most, fast = (given.get(name) for name in ("limit_train_batches", "max_steps", "fast_dev_run"))
        trainings = self.config.finetune.cycles if work.part != "vector" else 1
        epochs = trainer.max_epochs or work.epochs // trainings
        if fast:
            limit, epochs = int(fast), 1
        batches = len(sampler) if limit is None else limited(len(sampler), limit)
        steps = ceil(batches / trainer.accumulate_grad_batches) * epochs
        return trainings * (min(steps, most) if most and most > 0 else steps)

    def _streams(self, work: Workload) -> list[tuple[list[Row], int]]:
        """The rows of a stage, and those beside them, each with their number in a global batch."""
        sizes = {kind: length.sizes for kind, length in self.lengths.items()}
        whole = "vector" in work.samples and self.config.vector.loss_on == "all"
        main = [
            (_row(0 if whole else prompt, whole * prompt + response, kind == "undesired"), False)
            for kind, count in work.samples.items()
            for prompt, response in islice(cycle(sizes[kind]), count)
        ]
        beside = [(_row(*one, False), True) for one in sizes.get("kl") or sizes["benign"]]
        return [(main, work.batch_size), *([(beside, work.kl_batch_size)] if work.kl_batch_size else [])]

    def _step(self, work: Workload, rows: Sequence[Row]) -> Step:
        """A training step on `rows`, on one device."""
        layers, shards = self.shape.num_layers, 1 if work.on_one_device else self._shards
        deep = DEPTHS if self.alike and layers > max(DEPTHS) else (layers,)
        plan_step = partial(planned_step, self.config.model, self.config.optimizer, self.config.trainer)
        steps = [plan_step(with_layers(self.architecture, n), work, collate(rows), shards) for n in deep]
        step = steps[-1].deeper(steps[0], (layers - deep[-1]) / (deep[-1] - deep[0])) if len(steps) > 1 else steps[0]
        whole = gathered(self.shape, shards) * self.dtype_bytes
        ddp = self.config.trainer.strategy.startswith("ddp") and not work.on_one_device
        copies = work.trained * self.dtype_bytes * ddp
        return replace(
            step,
            forward=step.forward + Memory(whole, copies),
            backward=step.backward + Memory(whole, copies + whole * (work.part == "backbone")),
            optimizer=step.optimizer + Memory(0, copies),
        )

    @property
    def mixture(self) -> dict[str, int]:
        """Fine-tuning samples by kind."""
        return {kind: self.numbers[kind] for kind in ("undesired", "benign")}

    def _inference(self, prompts: int) -> tuple[float, int, int]:
        """FLOPs, decoding steps and bytes of the answers to `prompts`, and of the loss on as many references."""
        evaluation, test, new = self.config.evaluation, self.lengths["test"], self.config.evaluation.max_new_tokens
        rows, length = min(evaluation.batch_size, self.tests), test.longest_prompt + new
        scored = sum(islice(cycle(sorted((response for _, response in test.sizes), reverse=True)), rows))
        memory = answer_bytes(self.shape, self.dtype_bytes, rows, length, scored)
        steps = decode_steps(prompts, self.devices, evaluation.batch_size, new)
        tokens, logits = 2 * test.prompt + new + test.response, new + test.response
        return forward_flops(self.shape, prompts * tokens, prompts * logits), steps, memory

    def _probe_flops(self, per_token: float) -> float:
        """FLOPs of one probe of the telemetry: with the vector on and, where there is one, off."""
        defense, count = self.config.defense, self.config.telemetry.num_samples
        states = 2 if defense.uses_vector and defense.vector_acts else 1
        numbers = {kind: min(count, number) for kind, number in self.mixture.items()}
        undesired, benign = self.lengths["undesired"], self.lengths["benign"]
        gradient = per_token * numbers["undesired"] * (undesired.prompt + undesired.response)
        tokens, logits = benign.prompt + benign.response, benign.response
        return states * (gradient + numbers["benign"] * forward_flops(self.shape, tokens, logits))


def _row(prompt: int, response: int, undesired: bool) -> Encoded:
    return Encoded(range(prompt + response), prompt, undesired)


def _tokens(batch: Sequence[Row]) -> int:
    return sum(len(row.input_ids) for row, _ in batch)


def _skeleton(config: RunConfig, local_data: bool) -> tuple[PretrainedConfig, PreTrainedTokenizerBase | None]:
    """The model's architecture, and its tokenizer where that is on this machine."""
    if config.model.name_or_path is None:
        if (align := config.model.align) is None:
            raise tiny_unaligned()
        taught = align.behavior or config.behavior
        examples = align_examples(taught, config.data, align) if local_data else []
        tiny, tokenizer = build_tiny(tiny_texts(taught, config.data, align, examples) if local_data else [], 0)
        return tiny.config, tokenizer
    architecture, folder = load_architecture(config.model)
    return architecture, load_tokenizer(folder, config.model.trust_remote_code) if folder else None


def _check_layers(loras: Mapping[str, LoraSettings | None], last: int) -> None:
    """Raises ConfigError for layers that the model lacks; PEFT does so only when it lacks all of them."""
    for key, lora in loras.items():
        if beyond := [n for n in (lora.layers if lora else None) or [] if not 0 <= n <= last]:
            raise ConfigError(f"{key}.layers: {beyond} are out of range; the model has 0 to {last}")
