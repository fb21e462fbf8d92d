"""FLOPs, memory and time of training and inference: formulas over counts of parameters and tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

TRAIN_LOGIT_BYTES = 16
"""Per logit in training: values in bf16 and fp32, log-probabilities, and the gradients of both."""
KL_LOGIT_BYTES = 32
"""Per logit of a KL row: those of the base too."""
EVAL_LOGIT_BYTES = 8
"""Per logit of the loss on held-out samples: the values and an fp32 copy."""


@dataclass(frozen=True)
class Gpu:
    """A data sheet: GB, GB/s, dense TFLOP/s by the bytes of a number."""

    memory: float
    bandwidth: float
    tflops: Mapping[int, float]


GPUS = {
    "A100-80GB": Gpu(80, 2039, {2: 312, 4: 19.5, 8: 9.7}),
    "H100-80GB": Gpu(80, 3350, {2: 989, 4: 67, 8: 34}),
    "RTX 4090": Gpu(24, 1008, {2: 165, 4: 82.6, 8: 1.3}),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a causal LM: numbers, not bytes."""

    parameters: int
    matmul_parameters: int  # without the input embedding, unless it is the output head too
    layer_parameters: int  # of one transformer layer
    num_layers: int
    hidden_size: int
    kv_size: int  # keys and values of one token in all layers
    vocab_size: int


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device."""

    weights: float
    gradients: float = 0
    optimizer: float = 0
    copies: float = 0
    activations: float = 0

    @property
    def total(self) -> float:
        """The sum. An upper bound: the peaks do not all come at the same moment."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.activations


@dataclass(frozen=True)
class TrainingStep:
    """One forward and backward pass on one device."""

    trained: int  # parameters that get gradients
    adapters: int  # parameters of vector and task LoRA
    dtype_bytes: int  # of a weight
    rows: int
    length: int  # tokens of the longest row
    kl_rows: int = 0
    mixed: bool = False  # bf16-mixed: fp32 weights, products in bf16
    recompute: bool = False  # gradient checkpointing
    shards: int = 1  # devices that share weights, gradients and moments


def training_flops(parameters: int, tokens: float, *, full: bool, recompute: bool) -> float:
    """Per parameter and token 2 forward, 2 for gradients of activations (Kaplan et al., arXiv 2001.08361).

    `full` training costs 2 more, for gradients of the weights; `recompute` (gradient checkpointing) a forward pass.
    """
    return (4 + 2 * full + 2 * recompute) * parameters * tokens


def forward_flops(parameters: int, tokens: float) -> float:
    """2 per parameter and token."""
    return 2 * parameters * tokens


def training_memory(shape: Shape, step: TrainingStep) -> Memory:
    """Memory of a training step.

    AdamW keeps two moments in the type of the weights: with weight and gradient 16 bytes per fp32 parameter. FSDP
    divides all of them, but holds two layers, and what is in no layer, whole. bf16-mixed keeps a bf16 copy of every
    multiplied weight until the backward pass. Activations in 16 bits, without the attention matrix: 34 bytes per token,
    layer and channel; recomputed, 2 and one whole layer (Korthikanti et al., arXiv 2205.05198).
    """
    full = step.trained >= shape.parameters
    copied = shape.matmul_parameters if full or not step.recompute else shape.layer_parameters
    bytes_per_channel = 2 * shape.num_layers + 34 if step.recompute else 34 * shape.num_layers
    half = step.mixed or step.dtype_bytes == 2
    tokens = (step.rows + step.kl_rows) * step.length
    logits = (TRAIN_LOGIT_BYTES * step.rows + KL_LOGIT_BYTES * step.kl_rows) * step.length * shape.vocab_size
    return Memory(
        weights=held_weights(shape, step.adapters, step.shards) * step.dtype_bytes,
        gradients=step.trained / step.shards * step.dtype_bytes,
        optimizer=2 * step.trained / step.shards * step.dtype_bytes,
        copies=2 * copied if step.mixed and step.dtype_bytes > 2 else 0,
        activations=bytes_per_channel * (1 if half else 2) * tokens * shape.hidden_size + logits,
    )


def inference_memory(shape: Shape, adapters: int, dtype_bytes: int, rows: int, length: int, shards: int = 1) -> Memory:
    """Memory of generation or of held-out losses, whichever takes more; `shards` devices share the weights."""
    kv_cache = shape.kv_size * dtype_bytes * rows * length
    logits = EVAL_LOGIT_BYTES * rows * length * shape.vocab_size
    return Memory(weights=held_weights(shape, adapters, shards) * dtype_bytes, activations=max(kv_cache, logits))


def held_weights(shape: Shape, adapters: int, shards: int) -> float:
    """Weights on one device: its shard; two layers, and what is in no layer, whole."""
    outside = shape.parameters - shape.num_layers * shape.layer_parameters
    whole = outside + 2 * shape.layer_parameters if shards > 1 else 0
    return (shape.parameters + adapters) / shards + whole


def checkpoint_bytes(trained: int, dtype_bytes: int) -> int:
    """The trained weights and their two moments; frozen weights are not saved."""
    return 3 * trained * dtype_bytes


def decode_steps(prompts: int, devices: int, batch_size: int, new_tokens: int) -> int:
    """Tokens that a device generates one after another."""
    return ceil(ceil(prompts / devices) / batch_size) * new_tokens


def compute_seconds(gpu: Gpu, flops: float, dtype_bytes: int, devices: int, mfu: float) -> float:
    """Time of `flops` at the share `mfu` of the peak of all devices."""
    return flops / (gpu.tflops[dtype_bytes] * 1e12) / (devices * mfu)


def decode_seconds(gpu: Gpu, steps: int, weight_bytes: float) -> float:
    """Time of `steps` new tokens, for each of which all weights are read once."""
    return steps * weight_bytes / (gpu.bandwidth * 1e9)
