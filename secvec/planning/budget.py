"""The work of a run, stage by stage, before it starts: from its settings, its model's shape and its samples' length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from secvec.config.load import RunConfig
from secvec.data.datamodule import GlobalBatchSampler
from secvec.errors import ConfigError
from secvec.evaluation.generation import context_of
from secvec.models.backbone import ledger, load_tokenizer
from secvec.models.tiny import build_tiny
from secvec.models.vector import attach_new_vector, attach_task
from secvec.planning import flops as costs
from secvec.planning.architectures import architecture_of, shape_of
from secvec.planning.flops import Memory, Shape, forward_flops, training_flops
from secvec.planning.lengths import Length, at_hand, drawn, measure, tiny_words


@dataclass(frozen=True)
class Work:
    """What a stage does, and what it takes on the fullest device."""

    stage: str
    memory: Memory
    trained: int = 0
    frozen: int = 0
    samples: int = 0
    steps: int = 0
    tokens: float = 0
    training: float = 0
    """FLOPs at the precision of training."""
    asking: float = 0
    """FLOPs at the precision of the weights."""
    decoding: int = 0
    """Tokens that a device generates one after another."""
    devices: int = 1


@dataclass(frozen=True)
class Budget:
    """What the stages of a run cost."""

    config: RunConfig
    shape: Shape
    context: int
    parts: Mapping[str, int]
    """Parameters of backbone, vector, task."""
    lengths: Mapping[str, Length]
    """Of kinds undesired, benign, test."""
    tests: int
    """Held-out prompts of all kinds together."""
    notes: Sequence[str]

    @classmethod
    def of(cls, config: RunConfig) -> Budget:
        """Of a run: builds its model without weights, and draws its samples if they need not be fetched."""
        notes: list[str] = []
        examples = drawn(config) if at_hand(config) else None
        architecture, tokenizer = _skeleton(config, bool(examples))
        context, streams = context_of(architecture), {stream.kind for stream in config.data.benign}
        lengths = measure(examples, tokenizer, context, notes)
        tests = len(examples["test"]) if examples else config.evaluation.num_prompts * (1 + len(streams))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(architecture, trust_remote_code=config.model.trust_remote_code)
            shape = shape_of(model)
            _check_layers(config, shape.layers - 1)
            if config.defense.uses_vector:
                model = attach_new_vector(model, config.vector, config.vector.dropout)
            if config.tune.lora:
                model = attach_task(model, config.tune.lora)
        parts = {row.part: row.parameters for row in ledger(model)}
        return cls(config, shape, context, parts, lengths, tests, notes)

    @cached_property
    def devices(self) -> int:
        """In all; `auto` is what is here."""
        trainer = self.config.trainer
        here = 1 if trainer.accelerator == "cpu" else max(1, torch.cuda.device_count())
        return (here if trainer.devices == "auto" else trainer.devices) * trainer.num_nodes

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 8 if self.config.trainer.precision == "64-true" else 2 if self.config.model.dtype == "bfloat16" else 4

    @property
    def mixed(self) -> bool:
        """Whether fp32 weights are multiplied as bf16."""
        return self.config.trainer.precision == "bf16-mixed" and self.width == 4

    @property
    def adapters(self) -> int:
        """Parameters that are no backbone's."""
        return sum(n for part, n in self.parts.items() if part != "backbone")

    def check(self) -> None:
        """Raises ConfigError for batches that are too small for the devices, and for answers that do not fit."""
        config, new = self.config, self.config.evaluation.max_new_tokens
        if "vector" in config.stages:
            some = config.vector
            GlobalBatchSampler([some.num_samples], [some.batch_size], 0, 0, self.devices)
        GlobalBatchSampler([sum(config.data.counts)], [config.finetune.batch_size], 0, 0, self.devices)
        longest = max((length.longest_prompt for length in self.lengths.values()), default=0)
        if longest + new > self.context or max(length.longest for length in self.lengths.values()) > self.context:
            raise ConfigError(
                f"evaluation.max_new_tokens={new} and prompts of up to {longest} tokens do not fit into the model's "
                f"context of {self.context}"
            )

    def works(self) -> list[Work]:
        """What its stages do, in order, after what comes before them."""
        aligned = self.align()
        return [*([aligned] if aligned else []), *(getattr(self, stage)() for stage in self.config.stages)]

    def align(self) -> Work | None:
        """Teaching the base to refuse: once, on one device, kept for later runs."""
        align = self.config.model.align
        if align is None:
            return None
        samples = {"undesired": align.num_undesired, "benign": align.num_benign}
        return self._train("align (once)", self.parts["backbone"], samples, align.epochs, align.batch_size, 1)

    def vector(self) -> Work:
        """CE on the undesired samples; with a KL term, its rows beside them and again through the bare base."""
        some, samples = self.config.vector, {"undesired": self.config.vector.num_samples}
        kl = some.kl_batch_size if some.kl_weight > 0 else 0
        return self._train(
            "vector", self.parts["vector"], samples, some.epochs, some.batch_size, self.devices, kl,
            asked=some.gate.num_prompts + self.tests, adapters=self.parts["vector"],
        )  # fmt: skip

    def finetune(self) -> Work:
        """The mixture, and the probes of the telemetry."""
        config = self.config
        counts, trained = dict(zip(("undesired", "benign"), config.data.counts, strict=True)), self.parts.get("task")
        steps_every, passes = config.telemetry.every_n_steps, config.finetune.epochs * config.finetune.cycles
        return self._train(
            "finetune", trained or self.parts["backbone"], counts, passes, config.finetune.batch_size,
            self.devices, probe_every=steps_every, adapters=self.adapters,
        )  # fmt: skip

    def infer(self) -> Work:
        """All held-out prompts for base, active and after, the leak probes of the last, and its distance to the base.

        Without a vector, active is after.
        """
        some, behavior = self.config.evaluation, self.config.behavior
        ways = 3 + sum(map(bool, (behavior.eliciting_prompt, behavior.negated_prompt, behavior.answer_prefix)))
        states = 3 if self.config.defense.uses_vector else 2
        leaks = min(some.num_leak_prompts, some.num_prompts)
        asking, decoding, memory = self._ask(states * self.tests + ways * leaks)
        asking += forward_flops(self.shape.multiplied, 3 * some.num_prompts * self.lengths["test"].whole)
        memory = replace(memory, weights=memory.weights + self.shape.weights * self.width)  # and the base beside it
        return Work(
            "infer", memory, frozen=self.shape.weights + self.adapters, samples=self.tests, asking=asking,
            decoding=decoding, devices=self.devices,
        )  # fmt: skip

    def _ask(self, prompts: int) -> tuple[float, int, Memory]:
        """FLOPs, decoding steps and memory of answers to `prompts` and of the loss on as many references."""
        some, test = self.config.evaluation, self.lengths["test"]
        tokens = prompts * (test.prompt + some.max_new_tokens + test.whole)
        memory = costs.asking_memory(
            self.shape, adapters=self.adapters, bytes_each=self.width, rows=min(some.batch_size, self.tests),
            length=max(test.longest_prompt + some.max_new_tokens, test.longest),
        )  # fmt: skip
        steps = costs.decode_steps(prompts, self.devices, some.batch_size, some.max_new_tokens)
        return forward_flops(self.shape.multiplied, tokens), steps, memory

    def _train(
        self, stage: str, trained: int, samples: Mapping[str, int], epochs: int, batch_size: int, devices: int,
        kl_batch: int = 0, asked: int = 0, probe_every: int = 0, adapters: int = 0,
    ) -> Work:  # fmt: skip
        n, trainer, full = self.shape.multiplied, self.config.trainer, trained >= self.shape.weights
        recompute, several = self.config.model.gradient_checkpointing, devices > 1
        total = sum(samples.values())
        batches = ceil(total / batch_size)
        steps = ceil(batches / (trainer.accumulate_grad_batches if devices == self.devices else 1)) * epochs
        main = epochs * sum(count * self.lengths[kind].whole for kind, count in samples.items())
        kl = epochs * batches * kl_batch * self.lengths["benign"].whole
        training = training_flops(n, main + kl, all_weights=full, recompute=recompute) + forward_flops(n, kl)
        if probe_every:
            training += (steps // probe_every + 2) * self._probe(full, recompute)
        asking, decoding, _ = self._ask(asked) if asked else (0.0, 0, None)
        longest = max(self.lengths[kind].longest for kind in [*samples, *["benign"] * bool(kl_batch)])
        memory = costs.training_memory(
            self.shape, trained=trained, adapters=adapters, bytes_each=self.width, mixed=self.mixed,
            recompute=recompute, shards=devices if several and trainer.strategy == "fsdp" else 1,
            rows=ceil(ceil(total / batches) / devices), kl_rows=ceil(kl_batch / devices), length=longest,
        )  # fmt: skip
        frozen = self.shape.weights + adapters - trained
        return Work(stage, memory, trained, frozen, total, steps, main + kl, training, asking, decoding, devices)

    def _probe(self, full: bool, recompute: bool) -> float:
        """FLOPs of one probe of the telemetry, with the vector on and, where there is one, off."""
        n = self.shape.multiplied
        states = 2 if self.config.defense.uses_vector else 1
        rows = dict(zip(("undesired", "benign"), self.config.data.counts, strict=True))
        undesired, benign = (
            min(self.config.telemetry.num_samples, count) * self.lengths[kind].whole for kind, count in rows.items()
        )
        gradient = training_flops(n, undesired, all_weights=full, recompute=recompute)
        return states * (gradient + forward_flops(n, benign))


def _skeleton(config: RunConfig, drawable: bool) -> tuple[PretrainedConfig, PreTrainedTokenizerBase | None]:
    """The model's architecture, and its tokenizer where that is on this machine."""
    if config.model.name_or_path is None:
        tiny, tokenizer = build_tiny(tiny_words(config) if drawable else [], 0)
        return tiny.config, tokenizer
    architecture, folder = architecture_of(config.model)
    return architecture, load_tokenizer(folder, config.model.trust_remote_code) if folder else None


def _check_layers(config: RunConfig, last: int) -> None:
    """Raises ConfigError for layers that the model lacks; PEFT does so only when it lacks all of them."""
    vector = config.vector if config.defense.uses_vector else None
    for key, lora in (("vector", vector), ("tune.lora", config.tune.lora)):
        if beyond := [n for n in (lora.layers if lora else None) or [] if not 0 <= n <= last]:
            raise ConfigError(f"{key}.layers: {beyond} are out of range; the model has 0 to {last}")
