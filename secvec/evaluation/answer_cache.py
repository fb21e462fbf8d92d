"""Answers of an evaluation that has not ended: batch by batch on disk, so that an interrupted one goes on."""

from __future__ import annotations

import json
import os
from pathlib import Path

from secvec.data.prompts import Answer
from secvec.errors import ArtifactError


class KeptAnswers:
    """Whole batches of answers by key, in a JSONL file that only grows; one process writes it. Raises ArtifactError.

    The batch is the unit: padding changes rounding, so a row alone could be answered otherwise than among its fellows.
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
        self._batches[key] = answers
        if self.path is None:
            return
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
