"""How much does a vector explain of a row? Its loss with the vector on and off, token by token.

A row that shows the vector's behavior is far more likely with the vector on. An answer that hedges shows it in a few
words, and the mean over all its tokens hides them. So the score of a row is its highest mean gap (nats, vector off
minus on) over a window of a few consecutive response tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from secvec.data.batch import IGNORE, Encoded, collate
from secvec.data.encode import encode
from secvec.data.example import Example
from secvec.data.tokens import encoded
from secvec.errors import ArtifactError, DataError
from secvec.evaluation.prediction import predict
from secvec.models.backbone import fingerprint
from secvec.models.vector import SCORES, vector_off
from secvec.runs.files import write_atomic
from secvec.runs.processes import main_process, rank_and_world
from secvec.settings.schema import WINDOWS
from secvec.settings.trainer import TrainerSettings
from secvec.training.losses import token_losses

if TYPE_CHECKING:
    from secvec.module import SecVecModule

WINDOW = 3
MOST_TOKENS = 2**14
"""Of a batch, padding included: 128 rows of 128 tokens, or 8 of 2,048."""
ONE_DEVICE = TrainerSettings(
    accelerator="auto", devices=1, strategy="auto", precision="32-true", gradient_clip_val=None
)


class RowScore(NamedTuple):  # Lightning takes no frozen dataclass as the output of a batch
    """What a scan finds in one row; all in nats per response token."""

    scores: tuple[float, ...]
    """The highest mean gap over a window of each length in `WINDOWS`; a shorter response is one window."""
    loss_on: float
    loss_off: float
    words: str
    """The words in the window that was asked for; empty where it holds the end of the turn alone."""
    place: int
    """Where they begin in the decoded response."""

    def score(self, window: int) -> float:
        """The highest mean gap over `window` consecutive response tokens."""
        return self.scores[window - 1]

    @property
    def mean_gap(self) -> float:
        """Over all response tokens."""
        return self.loss_off - self.loss_on


def scan(
    module: SecVecModule,
    examples: Sequence[Example],
    window: int = WINDOW,
    batch_size: int = 16,
    trainer: TrainerSettings | None = None,
    cache: Path | None = None,
) -> list[RowScore]:
    """The score of each of `examples`, in their order: `scan(SecVecModule("infer", BASE, VECTOR), examples)`.

    Args:
        module: of stage "infer", with a vector.
        examples: prompts with the responses that are scored.
        window: the one whose words are told; `RowScore.score` takes all.
        batch_size: only the logits of one batch are in memory.
        trainer: where the model runs; None: on one device. Every process must call it: they share out the batches.
        cache: where the tokens of large data are kept; None: in memory.

    Raises:
        ArtifactError: for a vector of another model.
        DataError: for a row that the model does not take, or whose loss is NaN or infinite.
    """
    if isinstance(module.vector, Path):
        module.backbone.check_vector(module.vector)
    tokenizer, context = module.backbone.tokenizer, module.backbone.context
    rows = encoded(examples, tokenizer, context, cache) if cache else encode(examples, tokenizer, context)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))  # little padding, and the largest first
    rank, world = rank_and_world()
    chunks: list[list[int]] = []
    most = 0
    for row in order:
        if not chunks or len(chunks[-1]) == most:
            chunks.append([])
            most = max(1, min(batch_size, MOST_TOKENS // len(rows[row].input_ids)))
        chunks[-1].append(row)
    batches = [partial(_scores, chunk, [rows[i] for i in chunk], window) for chunk in chunks[rank::world]]
    (found,) = predict(module, [batches], trainer or ONE_DEVICE, "scan")
    scores: list[RowScore] = [score for _, score in sorted(found, key=lambda pair: pair[0])]
    for example, score in zip(examples, scores, strict=True):
        if not np.isfinite(score.scores).all():  # it would pass as a row that is not flagged
            raise DataError(
                f"{example.source or example.kind}: the loss of the response is NaN or infinite; give "
                "trainer.precision=32-true, or remove the row"
            )
    return scores


def _scores(
    numbers: Sequence[int], rows: Sequence[Encoded], window: int, module: SecVecModule
) -> list[tuple[int, RowScore]]:
    """The place, among all rows, and the score of each of `rows`, which are of similar length."""
    tokenizer, batch = module.backbone.tokenizer, collate([(row, False) for row in rows])
    on = token_losses(module.model, batch).double().cpu()
    with vector_off(module.model):
        off = token_losses(module.model, batch).double().cpu()
    here = batch["labels"][:, 1:] != IGNORE
    return [
        (number, _row_score(row, tokenizer, off[i][here[i]].numpy(), on[i][here[i]].numpy(), window))
        for i, (number, row) in enumerate(zip(numbers, rows, strict=True))
    ]


def _row_score(
    row: Encoded, tokenizer: PreTrainedTokenizerBase, off: np.ndarray, on: np.ndarray, window: int
) -> RowScore:
    sums = np.concatenate([[0.0], np.cumsum(off - on)])
    means = [(sums[width:] - sums[:-width]) / width for width in (min(size, len(on)) for size in WINDOWS)]
    start = int(means[window - 1].argmax())
    response = np.asarray(row.input_ids)[row.num_prompt :].tolist()
    text, before, until = (
        str(tokenizer.decode(response[:end], skip_special_tokens=True)) for end in (None, start, start + window)
    )
    first = len(before) - len(re.findall(r"\w{0,15}$", before)[0])  # words that the tokens cut are shown whole
    last = len(until) + len(re.findall(r"^\w{0,15}", text[len(until) :])[0]) if len(until) > len(before) else first
    words = text[first:last]
    place = first + len(words) - len(words.lstrip())
    return RowScore(
        tuple(float(mean.max()) for mean in means), float(on.mean()), float(off.mean()), words.strip(), place
    )


def quantile_threshold(scores: Sequence[float], quantile: float) -> float:
    """The score above which a row is flagged, from those of rows that are benign."""
    return float(np.quantile(scores, quantile, method="higher"))


def share_above(n: int, quantile: float) -> float:
    """The share of benign rows to expect above `quantile_threshold`, where `n` benign rows gave it."""
    return (n - ceil((n - 1) * quantile)) / (n + 1)


def keep_scores(folder: Path, found: Mapping[str, Sequence[RowScore]], about: Mapping[str, Any]) -> None:
    """Writes scan.json into the folder of a vector: the scores of its own samples, by kind and window."""
    if main_process():
        tables = {
            kind: [[round(score.score(window), 4) for score in scores] for window in WINDOWS]
            for kind, scores in found.items()
        }
        write_atomic(folder / SCORES, json.dumps({"vector": fingerprint(folder), **about, **tables}) + "\n")


def kept_scores(folder: Path) -> dict[str, Any]:
    """What `keep_scores` wrote: `undesired` and `benign`, each a list of scores for each window; {} for other vectors.

    Raises ArtifactError where the file is damaged, or of other weights than those beside it.
    """
    path = folder / SCORES
    if not path.is_file():
        return {}
    try:
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole = all(len(kept[kind]) == len(WINDOWS) for kind in ("undesired", "benign"))
        same = kept["vector"] == fingerprint(folder)
    except (ValueError, TypeError, KeyError):
        whole = same = False
    if not (whole and same):
        raise ArtifactError(
            f"{path} is damaged or belongs to other weights than those beside it: copy the whole folder of the vector "
            "again, or remove the file and give scan.threshold or scan.benign_file"
        )
    return kept
