"""Answers on disk: batches of an evaluation that has not ended, and whole ones for all runs that ask the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from secvec.data.prompts import Answer
from secvec.errors import ArtifactError
from secvec.evaluation.verdicts import EvaluationResult
from secvec.metrics import Measurement
from secvec.runs.cache import cached
from secvec.runs.processes import from_first, main_process


class KeptAnswers:
    """Whole batches of answers by key, in a JSONL file that only grows; one process writes it. Raises ArtifactError.

    The batch is the unit: padding changes rounding, so a row can get another answer alone than in its batch.
    """

    def __init__(self, path: Path | None):
        """None: nothing is kept."""
        self.path = path
        self._batches = {} if path is None else _read(path)

    def get(self, key: str) -> list[Answer] | None:
        """The answers of a batch, if they were all written."""
        return self._batches.get(key)

    def add(self, key: str, answers: list[Answer]) -> None:
        """Keeps the answers of a batch; they are on the disk when it returns."""
        if self.path is None:
            return
        self._batches[key] = answers
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([key, answers]) + "\n")
            stream.flush()
            os.fsync(stream.fileno())


def _read(path: Path) -> dict[str, list[Answer]]:
    """The batches in a file; a last line without its end, of a process killed while it wrote, is cut off."""
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    try:
        batches = [json.loads(line) for line in whole.splitlines()]
        return {key: [Answer(*answer) for answer in answers] for key, answers in batches}
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"{path} is damaged ({error}): remove it, and its answers are written again") from None


def kept_result(path: Path, evaluate: Callable[[], EvaluationResult]) -> EvaluationResult:
    """The result in `path`, evaluated first where there is none yet. Every process must call it.

    One with verdicts that could not be read is evaluated again: the judge may give them this time.
    """
    if not dist.is_initialized():
        return _read_result(cached(path, lambda out: _write_result(out, evaluate()), _is_judged))
    found = from_first(lambda: _read_result(path) if _is_judged(path) else None)
    if found is None:
        found = evaluate()  # all processes together, and none of them holds a lock meanwhile
        if main_process():
            cached(path, lambda out: _write_result(out, found), _is_judged)
    return found


def _is_judged(path: Path) -> bool:
    return path.is_file() and all(row.get("verdict") != "unparsable" for row in _read_result(path).predictions)


def _write_result(path: Path, result: EvaluationResult) -> None:
    path.write_text(json.dumps(asdict(result)) + "\n", encoding="utf-8")


def _read_result(path: Path) -> EvaluationResult:
    kept = json.loads(path.read_text(encoding="utf-8"))
    metrics = {name: Measurement(**measured) for name, measured in kept["metrics"].items()}
    return EvaluationResult(metrics, kept["predictions"])
