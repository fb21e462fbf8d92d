"""A cache of judgements on disk, by content: nothing is judged twice, and a stopped run continues."""

import hashlib
import json
import logging
import sqlite3
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, get_args

from pydantic import Field
from tqdm import tqdm

from secvec.data.example import Example
from secvec.errors import ArtifactError
from secvec.judges.base import Judge, Judgement, Verdict
from secvec.settings.schema import Count

log = logging.getLogger(__name__)

LOCK_SECONDS = 60.0
"""Most seconds that a process waits while another writes."""
_ROWS = 500
"""Keys per query; old versions of SQLite take at most 999."""


class Store:
    """One SQLite file of judgements by key; safe for any number of processes. Raises ArtifactError."""

    def __init__(self, path: Path):
        self.path = path

    def check(self) -> None:
        """The file can be opened and written."""
        self._run("SELECT 1", [()])

    def find(self, keys: Sequence[str]) -> dict[str, Judgement]:
        """The judgements of those `keys` that are stored."""
        found: dict[str, Judgement] = {}
        for start in range(0, len(keys), _ROWS):
            batch = keys[start : start + _ROWS]
            marks = ",".join("?" * len(batch))
            rows = self._run(f"SELECT key, verdict, score FROM judgements WHERE key IN ({marks})", [batch])
            found.update(
                {key: Judgement(verdict, score) for key, verdict, score in rows if verdict in get_args(Verdict)}
            )
        return found

    def add(self, judgements: Mapping[str, Judgement]) -> None:
        """Writes all of `judgements` or none. Unparsable ones are left out, so that they are judged again."""
        rows = [(key, j.verdict, j.score) for key, j in judgements.items() if j.verdict != "unparsable"]
        self._run("INSERT OR IGNORE INTO judgements VALUES (?, ?, ?)", rows)

    def _run(self, statement: str, rows: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.path, timeout=LOCK_SECONDS)) as connection, connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, verdict TEXT NOT NULL, score REAL)"
                )
                return [answer for row in rows for answer in connection.execute(statement, row)]
        except (sqlite3.Error, OSError) as error:
            raise ArtifactError(
                f"judge.cache={self.path} cannot be used as a cache of judgements ({error}): move the file away, "
                "give another one, or use none (judge.cache=null)"
            ) from None


class CachedJudge(Judge):
    """Base of judges that are slow or cost money: they judge in batches, and nothing twice.

    A judgement may depend only on the messages and the facts of an example and on the response, and on the reference
    under `reads_reference`. A field that does not change judgements is declared with `Field(exclude=True)`. An empty
    response is `other` without being judged.
    """

    batch_size: Count = Field(exclude=True)
    """Responses that are judged and then written to the cache together."""
    cache: Path | None = Field(exclude=True)
    """The file of the cache; None: no cache."""

    @property
    def reads_reference(self) -> bool:
        """Whether it compares the response with the reference."""
        return False

    def check(self) -> None:
        """Its cache can be used."""
        if self.cache:
            Store(self.cache).check()

    @abstractmethod
    def _judge_batch(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Judgement]:
        """One judgement per response, in order."""

    def identity(self) -> dict[str, Any]:
        """Everything that judgements depend on, except example and response."""
        kind = type(self)
        return {"judge": f"{kind.__module__}.{kind.__qualname__}", **self.model_dump(mode="json", exclude={"name"})}

    def judge(self, examples: Sequence[Example], responses: Sequence[str]) -> list[Judgement]:
        """One judgement per response; each batch is in the cache as soon as it is judged."""
        rows = [i for i, response in enumerate(responses) if response.strip()]
        keys = dict(zip(rows, self._keys([examples[i] for i in rows], [responses[i] for i in rows]), strict=True))
        known = Store(self.cache).find(sorted(set(keys.values()))) if self.cache and keys else {}
        first = {key: i for i, key in reversed(keys.items()) if key not in known}  # equal ones are judged once
        todo = sorted(first.values())
        with tqdm(total=len(todo), desc=f"judge {self.name}", unit="response", mininterval=0.5, leave=False) as bar:
            for start in range(0, len(todo), self.batch_size):
                batch = todo[start : start + self.batch_size]
                judged = self._judge_batch([examples[i] for i in batch], [responses[i] for i in batch])
                made = {keys[i]: judgement for i, judgement in zip(batch, judged, strict=True)}
                if self.cache:
                    Store(self.cache).add(made)
                known |= made
                bar.update(len(batch))
        given = [known[keys[i]] if i in keys else Judgement("other", 0.0) for i in range(len(responses))]
        if unread := sum(judgement.verdict == "unparsable" for judgement in given):
            log.warning("judge %s gave no verdict on %d of %d responses", self.name, unread, len(given))
        return given

    def keep(self, examples: Sequence[Example], responses: Sequence[str], judged: Sequence[Judgement]) -> None:
        """Writes those judgements of a batch that were made before the rest failed."""
        if self.cache:
            Store(self.cache).add(dict(zip(self._keys(examples, responses), judged, strict=True)))

    def _keys(self, examples: Sequence[Example], responses: Sequence[str]) -> list[str]:
        if not examples:
            return []
        start = hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode())
        keys = []
        for example, response in zip(examples, responses, strict=True):
            key = start.copy()
            content = [example.messages, example.facts, response, *([example.response] * self.reads_reference)]
            key.update(json.dumps(content, sort_keys=True).encode())
            keys.append(key.hexdigest())
        return keys
