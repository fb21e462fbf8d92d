"""One training step on tensors without values (torch's fake tensors): its FLOPs, and its memory at its peak.

It is the step that the run makes: the model's own code, the loss, the optimizer, mixed precision and recomputation.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula
from transformers import AutoModelForCausalLM, PretrainedConfig

from secvec.data.batch import Batch
from secvec.errors import ConfigError, one_line
from secvec.models.backbone import prepared, set_trainable
from secvec.models.kept import keep_weights
from secvec.models.packing import PACKED
from secvec.models.quantized import BYTES, is_quantized, mark_as_quantized
from secvec.settings.schema import ModelSettings
from secvec.settings.trainer import OptimizerSettings, TrainerSettings
from secvec.stages.base import Workload
from secvec.training.optim import build_optimizer
from secvec.training.trainer import precision_on_cpu

aten = torch.ops.aten
logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it prints a traceback of what is raised
for suffix in ("", "_backward"):  # torch has the FLOPs of this attention for GPUs only
    here = getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{suffix}")
    if here not in flop_registry:
        formula = flop_registry[getattr(aten, f"_scaled_dot_product_flash_attention{suffix}")]
        register_flop_formula(here, get_raw=True)(formula)


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device, at one moment."""

    weights: float
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    """All else: what the backward pass needs, logits, copies of weights, what the optimizer holds meanwhile."""

    @property
    def total(self) -> float:
        """The sum."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(getattr(self, name) + getattr(other, name) for name in KINDS))

    def __mul__(self, factor: float) -> Memory:
        return Memory(*(getattr(self, name) * factor for name in KINDS))


KINDS = tuple(Memory.__annotations__)


@dataclass(frozen=True)
class Step:
    """What one training step takes on one device."""

    flops: float
    forward: Memory
    """At the peak of this phase, as the two below."""
    backward: Memory
    optimizer: Memory

    @property
    def peak(self) -> Memory:
        """The fullest of the three."""
        return max(self.forward, self.backward, self.optimizer, key=lambda memory: memory.total)

    def deeper(self, other: Step, times: float) -> Step:
        """The step of a deeper model: this one plus `times` its difference to `other`. Each layer adds the same."""
        parts = ((getattr(self, name), getattr(other, name)) for name in Step.__annotations__)
        return Step(*(one + (one + two * -1) * times for one, two in parts))


class Counter(TorchDispatchMode):
    """Counts FLOPs, and the bytes of all tensors that are made inside and held.

    `shards` devices share weights, gradients and moments, and the optimizer's work on them.
    """

    def __init__(self, shards: int = 1):
        super().__init__()
        self.shards, self.flops, self.optimizing = shards, 0.0, False
        self._held: dict[int, tuple[Any, str, float]] = {}
        self._bytes = dict.fromkeys(KINDS, 0.0)
        self._peak: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Runs `func`."""
        out = func(*args, **kwargs or {})
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **kwargs or {}, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.note(tensor)
        return out

    def note(self, tensor: Tensor, kind: str = "activations", share: float = 1) -> None:
        """Counts the memory of `tensor`, or a `share` of it, once, as `kind`."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held:
            if kind == "activations":
                return
            self._drop(key)
        divided = kind != "activations" or self.optimizing
        size = storage.nbytes() * share / (self.shards if divided else 1)
        self._held[key] = weakref.ref(storage, lambda _: self._drop(key)), kind, size
        self._bytes[kind] += size
        if sum(self._bytes.values()) > sum(self._peak.values()):
            self._peak = dict(self._bytes)

    def _drop(self, key: int) -> None:
        _, kind, size = self._held.pop(key)
        self._bytes[kind] -= size

    def begin(self) -> Memory:
        """The fullest moment since the last call."""
        before, self._peak = Memory(**{kind: self._peak.get(kind, 0) for kind in KINDS}), dict(self._bytes)
        return before


def count_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    change: Callable[[], object] = lambda: None,
    shards: int = 1,
    accumulates: bool = False,
) -> Step:
    """A step as Lightning makes it after a first one: the old gradients are held during the forward pass.

    With `accumulates` they are held until the optimizer's step. `change` is what is done to gradients before it. The
    model is on the CPU, with values or without. Of the weights in 4 bits one at a time is made whole, to be multiplied.
    """
    counter, trained = Counter(shards), [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(lambda p: counter.note(p.grad, "gradients")) for p in trained]
    with counter:
        for tensor in (*model.parameters(), *model.buffers()):
            counter.note(tensor, "weights", BYTES / tensor.element_size() if is_quantized(tensor) else 1)
        for p in trained:
            p.grad = torch.zeros_like(p)
            counter.note(p.grad, "gradients")
        optimizer.step()
        for tensor in tree_leaves(list(optimizer.state.values())):
            if isinstance(tensor, Tensor):
                counter.note(tensor, "optimizer")
        counter.flops = 0
        counter.begin()
        value = loss()
        forward = counter.begin()
        if not accumulates:
            optimizer.zero_grad()
        value.backward()
        change()
        backward = counter.begin()
        counter.optimizing = True
        optimizer.step()
    for hook in hooks:
        hook.remove()
    whole = Memory(0, activations=max((p.nbytes for p in model.parameters() if is_quantized(p)), default=0))
    return Step(counter.flops, forward + whole, backward + whole, counter.begin())


def planned_step(
    settings: ModelSettings,
    optimizer_settings: OptimizerSettings,
    trainer: TrainerSettings,
    architecture: PretrainedConfig,
    work: Workload,
    batch: Batch,
    shards: int,
) -> Step:
    """The step of a stage with `batch` on one device. Raises ConfigError for a model that asks for values."""
    plugin = precision_on_cpu(trainer.precision)
    dtype = getattr(torch, settings.dtype)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            architecture, dtype=dtype, trust_remote_code=settings.trust_remote_code
        )
        # whether rows may stand in one sequence is tried on values, which there are none of
        model = prepared(model, settings.model_copy(update={"packing": False}))
        if settings.packing and model.config._attn_implementation == "sdpa":
            model.set_attn_implementation(PACKED)
        if settings.quantization:
            mark_as_quantized(model)
        model = plugin.convert_module(work.attach(model))
    set_trainable(model, work.part)
    model = _on_cpu(model).train()
    if work.keeps_weights:
        keep_weights(model)
    optimizer = build_optimizer(optimizer_settings, (p for p in model.parameters() if p.requires_grad), 1e-3)
    if trainer.accelerator != "cpu":
        for group in optimizer.param_groups:
            if group.get("foreach", True) is None and not group.get("fused"):
                group["foreach"] = True  # torch's choice on a GPU

    batch = {**batch, "step": work.step}

    def loss() -> Tensor:
        with plugin.forward_context():
            return work.loss(model, batch)["loss"]

    def change() -> None:
        with plugin.forward_context():
            work.gradients(model, [batch])

    accumulates = trainer.accumulate_grad_batches > 1 and not work.on_one_device
    try:
        return count_step(model, optimizer, loss, change, shards, accumulates)
    except RuntimeError as error:
        raise ConfigError(
            f"model.name_or_path={settings.name_or_path}: a step of {architecture.model_type} cannot be counted "
            f"on fake tensors ({one_line(error, 200)}), so it has no plan. Start the run without plan=true"
        ) from None


def _on_cpu(model: nn.Module) -> nn.Module:
    """A model on the meta device as one on the CPU: its attention is then one that stores no scores."""
    made: dict[int, Any] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for p in model.parameters():
            made[id(p)] = nn.Parameter(torch.empty_like(p, device="cpu"), p.requires_grad)
            made[id(p)].__dict__.update(vars(p))  # whether it is in 4 bits
        for buffer in model.buffers():
            made[id(buffer)] = torch.empty_like(buffer, device="cpu")
    return deepcopy(model, made)
