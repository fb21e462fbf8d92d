"""What training and asking a transformer costs: pure formulas over counts of weights and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

LOGIT_BYTES = 16
"""Per logit in training: bf16 and fp32 values, log-probabilities, and the gradients of both."""
KL_LOGIT_BYTES = 32
"""Per logit of a KL row: those of the base too."""
ASK_LOGIT_BYTES = 8
"""Per logit of the loss on held-out samples: the values and an fp32 copy."""


@dataclass(frozen=True)
class Gpu:
    """A data sheet: GB, GB/s, dense TFLOP/s by the bytes of a number."""

    memory: float
    bandwidth: float
    tflops: dict[int, float]


GPUS = {
    "A100-80GB": Gpu(80, 2039, {2: 312, 4: 19.5, 8: 9.7}),
    "H100-80GB": Gpu(80, 3350, {2: 989, 4: 67, 8: 34}),
    "RTX 4090": Gpu(24, 1008, {2: 165, 4: 82.6, 8: 1.3}),
}


@dataclass(frozen=True)
class Shape:
    """What the formulas need to know of a model. Counts are of numbers, not bytes."""

    weights: int
    """All of the backbone's."""
    multiplied: int
    """Those in matrix products: without the input embedding, unless it is the output head too."""
    layer: int
    """Of one transformer layer."""
    layers: int
    hidden: int
    cache: int
    """Keys and values of one token in all layers."""
    vocabulary: int


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
        """All at once: an upper bound, since not every peak comes at the same moment."""
        return self.weights + self.gradients + self.optimizer + self.copies + self.activations


def training_flops(weights: int, tokens: float, *, all_weights: bool, recompute: bool) -> float:
    """Forward 2 and gradient of the activations 2 per weight and token (Kaplan et al., arXiv 2001.08361).

    Gradients of the weights cost 2 more where they are trained; a frozen backbone under a LoRA has none. Gradient
    checkpointing (`recompute`) repeats the forward pass.
    """
    return (4 + 2 * all_weights + 2 * recompute) * weights * tokens


def forward_flops(weights: int, tokens: float) -> float:
    """2 per weight and token."""
    return 2 * weights * tokens


def training_memory(
    shape: Shape, *, trained: int, adapters: int, bytes_each: int, mixed: bool, recompute: bool, shards: int,
    rows: int, length: int, kl_rows: int = 0,
) -> Memory:  # fmt: skip
    """Of a stage that trains `trained` weights on `rows` (and `kl_rows`) rows of `length` tokens a device and pass.

    AdamW keeps two moments in the weights' own type: 8 bytes per fp32 weight, 16 in all with weight and gradient.
    FSDP (`shards` > 1) divides all three, and holds two layers and all that is in no layer whole. bf16-mixed keeps a
    bf16 copy of every multiplied weight until the backward pass. Activations: 34 bytes per token, layer and channel in
    16 bits without the attention matrix, or 2 and one layer in whole when recomputed (Korthikanti et al., arXiv
    2205.05198).
    """
    stored = shape.weights + adapters
    outside = shape.weights - shape.layers * shape.layer
    whole = (outside + 2 * shape.layer) if shards > 1 else 0
    full = trained >= shape.weights
    copied = shape.multiplied if full or not recompute else shape.layer
    tokens, wide = (rows + kl_rows) * length, 1 if mixed or bytes_each == 2 else 2
    per_channel = 2 * shape.layers + 34 if recompute else 34 * shape.layers
    logits = (LOGIT_BYTES * rows + KL_LOGIT_BYTES * kl_rows) * length * shape.vocabulary
    return Memory(
        weights=(stored / shards + whole) * bytes_each,
        gradients=trained / shards * bytes_each,
        optimizer=2 * trained / shards * bytes_each,
        copies=2 * copied if mixed and bytes_each > 2 else 0,
        activations=per_channel * wide * tokens * shape.hidden + logits,
    )


def asking_memory(shape: Shape, *, adapters: int, bytes_each: int, rows: int, length: int) -> Memory:
    """Of generation and of the loss on held-out samples, whichever is larger; the model is whole on every device."""
    cache = shape.cache * bytes_each * rows * length
    logits = ASK_LOGIT_BYTES * rows * length * shape.vocabulary
    return Memory(weights=(shape.weights + adapters) * bytes_each, activations=max(cache, logits))


def checkpoint_bytes(trained: int, bytes_each: int) -> int:
    """What is trained and its two moments; the frozen rest is not in it."""
    return 3 * trained * bytes_each


def decode_steps(prompts: int, devices: int, batch_size: int, new_tokens: int) -> int:
    """Tokens that a device generates one after another."""
    return ceil(ceil(prompts / devices) / batch_size) * new_tokens


def seconds(gpu: Gpu, devices: int, mfu: float, flops: dict[int, float], steps: int, weight_bytes: float) -> float:
    """Arithmetic at `mfu` of the peak (`flops` by bytes of a number), and reading all weights for every new token."""
    arithmetic = sum(some / (gpu.tflops[width] * 1e12) for width, some in flops.items()) / (devices * mfu)
    return arithmetic + steps * weight_bytes / (gpu.bandwidth * 1e9)
