"""Teacher-forced losses of held-out samples, without generation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import accumulate, chain
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secvec.data.batch import IGNORE, Batch, Encoded, collate
from secvec.data.encode import encode
from secvec.data.example import Example
from secvec.errors import ArtifactError
from secvec.evaluation.prediction import predict
from secvec.models.backbone import Backbone
from secvec.models.logits import logits_at
from secvec.models.vector import vector_off
from secvec.runs.processes import rank_and_world
from secvec.settings.schema import EvaluationSettings
from secvec.settings.trainer import TrainerSettings
from secvec.training.losses import before_labels, token_losses

if TYPE_CHECKING:
    from secvec.module import SecVecModule

ON_DISK = 2 * 10**9
"""Bytes of distributions that wait on the disk at a time."""


def sample_losses(
    module: SecVecModule,
    examples: Mapping[str, Sequence[Example]],
    settings: EvaluationSettings,
    trainer: TrainerSettings,
    without_vector: bool = False,
) -> dict[str, list[float]]:
    """Mean nats per response token of each sample, by kind. Every process must call it: the batches are shared out.

    Raises ArtifactError for a loss that is NaN.
    """
    if not examples:
        return {}
    loaders = [
        [
            partial(_losses, number, batch, without_vector)
            for number, batch in _mine(_rows(module.backbone, kind), settings.batch_size)
        ]
        for kind in examples.values()
    ]
    outputs = predict(module, loaders, trainer, "losses")
    losses = {
        kind: [loss for _, batch in sorted(found) for loss in batch]
        for kind, found in zip(examples, outputs, strict=True)
    }
    if any(map(isnan, chain.from_iterable(losses.values()))):
        raise ArtifactError(
            f"{module.backbone.folder}: the loss of a response is NaN. The weights are damaged, or model.dtype and "
            "trainer.precision are too small for them"
        )
    return losses


def row_losses(model: nn.Module, batch: Batch) -> list[float]:
    """Mean nats per response token of each row of `batch`."""
    nll = token_losses(model, batch)
    counts = (batch["labels"][:, 1:] != IGNORE).sum(1).to(nll.device)
    losses: list[float] = (nll.sum(1) / counts).tolist()
    return losses


def in_parts(backbone: Backbone, examples: Sequence[Example], batch_size: int) -> list[list[tuple[int, Batch]]]:
    """The batches of this process with their numbers, in parts whose distributions take about `ON_DISK` bytes.

    Every process has as many parts.
    """
    rows = _rows(backbone, examples)
    answers = [len(row.input_ids) - row.num_prompt for row in rows]
    tokens = accumulate(sum(answers[start : start + batch_size]) for start in range(0, len(rows), batch_size))
    part_of = [4 * backbone.vocabulary * n // ON_DISK for n in tokens]
    parts: dict[int, list[tuple[int, Batch]]] = {part: [] for part in part_of}
    for number, batch in _mine(rows, batch_size):
        parts[part_of[number]].append((number, batch))
    return list(parts.values())


def keep_log_probs(
    module: SecVecModule, part: Sequence[tuple[int, Batch]], folder: Path, trainer: TrainerSettings
) -> None:
    """Writes the next-token distributions of `module` into `folder`: float32 takes 4 V bytes for each response token.

    They wait on the disk, so that what is compared with them is loaded when this model is gone. Every process must call
    it with its own batches.
    """
    batches = [partial(_write_log_probs, batch, folder / f"{number}.safetensors") for number, batch in part]
    predict(module, [batches], trainer, "distributions")


def kl_to_kept(
    base: SecVecModule, part: Sequence[tuple[int, Batch]], folder: Path, trainer: TrainerSettings
) -> list[tuple[int, list[float]]]:
    """KL(base || model) in nats per response token: how far a model has moved from `base` on the samples of `part`.

    By batch, its number and one value for each of its rows; those of all processes. `folder` holds what
    `keep_log_probs` wrote of the model for the same batches. Every process must call it.
    """
    batches = [partial(_kl, number, batch, folder / f"{number}.safetensors") for number, batch in part]
    (found,) = predict(base, [batches], trainer, "KL to base")
    return found


def _losses(number: int, batch: Batch, without_vector: bool, module: SecVecModule) -> list[tuple[int, list[float]]]:
    """The number of a batch, and the mean nats per response token of each of its rows."""
    with vector_off(module.model) if without_vector else nullcontext():
        return [(number, row_losses(module.model, batch))]


def _write_log_probs(batch: Batch, file: Path, module: SecVecModule) -> list[tuple[int, list[float]]]:
    save_file({"log_probs": _log_probs(module.model, batch).cpu()}, file)
    return []


def _kl(number: int, batch: Batch, file: Path, module: SecVecModule) -> list[tuple[int, list[float]]]:
    """The number of a batch, and the mean KL(model || file) per response token of each of its rows."""
    own = _log_probs(module.model, batch)
    kl = (own.exp() * (own - load_file(file)["log_probs"].to(own.device))).sum(-1)
    file.unlink()
    sizes = before_labels(batch["labels"]).sum(1).tolist()
    return [(number, [float(row.mean()) for row in kl.split(sizes)])]


def _log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """(N, V): of the tokens that `before_labels` marks."""
    here = before_labels(batch["labels"])
    return logits_at(model, batch["input_ids"], batch["attention_mask"], here).float().log_softmax(-1)


def _rows(backbone: Backbone, examples: Sequence[Example]) -> list[Encoded]:
    return encode(examples, backbone.tokenizer, backbone.context)


def _mine(rows: Sequence[Encoded], batch_size: int) -> list[tuple[int, Batch]]:
    """The batches of this process with their numbers."""
    rank, world = rank_and_world()
    starts = list(enumerate(range(0, len(rows), batch_size)))[rank::world]
    return [(number, collate([(row, False) for row in rows[start : start + batch_size]])) for number, start in starts]
