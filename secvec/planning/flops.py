"""Time, disk, and the memory and FLOPs of answers: formulas over counts of parameters and tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

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
    head_parameters: int  # of the output head
    inner_parameters: int  # that multiply every token: all but the embeddings
    layer_parameters: int  # of one transformer layer
    num_layers: int
    kv_size: int  # keys and values of one token in all layers
    vocab_size: int


def forward_flops(shape: Shape, tokens: float, logits: float) -> float:
    """2 per parameter and token; the output head multiplies those whose `logits` are needed."""
    return 2 * (shape.inner_parameters * tokens + shape.head_parameters * logits)


def answer_bytes(shape: Shape, dtype_bytes: int, rows: int, length: int, logits: int) -> int:
    """Keys and values of `rows` answers, or the `logits` of held-out losses, whichever take more."""
    return max(shape.kv_size * dtype_bytes * rows * length, EVAL_LOGIT_BYTES * logits * shape.vocab_size)


def gathered(shape: Shape, shards: int) -> int:
    """Weights that FSDP holds whole beside a device's shard: two layers, and what is in no layer."""
    outside = shape.parameters - shape.num_layers * shape.layer_parameters
    return outside + 2 * shape.layer_parameters if shards > 1 else 0


def checkpoint_bytes(trained: int, dtype_bytes: int, keeps_weights: bool) -> int:
    """The trained weights, their two moments, and the copy that a defense keeps; frozen weights are not saved."""
    return (3 + keeps_weights) * trained * dtype_bytes


def decode_steps(prompts: int, devices: int, batch_size: int, new_tokens: int) -> int:
    """Tokens that a device generates one after another."""
    return ceil(ceil(prompts / devices) / batch_size) * new_tokens


def compute_seconds(gpu: Gpu, flops: float, dtype_bytes: int, devices: int, mfu: float) -> float:
    """Time of `flops` at the share `mfu` of the peak of all devices."""
    return flops / (gpu.tflops[dtype_bytes] * 1e12) / (devices * mfu)


def decode_seconds(gpu: Gpu, steps: int, weight_bytes: float) -> float:
    """Time of `steps` new tokens, for each of which all weights are read once."""
    return steps * weight_bytes / (gpu.bandwidth * 1e9)
