"""Which examples each stage gets: exact counts, seeded, and no prompt in two splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

from secvec.data.example import OWNER, Example, Split, Stream
from secvec.errors import ConfigError, DataError, TooFewError

Asked = tuple[str, int | None, Callable[[], Any]]
"""A setting, how many samples it asks for (None: all), and how they are drawn."""


def draw_benign(
    streams: Sequence[Stream],
    split: Split,
    n: int | None,
    seed: int,
    weights: Sequence[float] | None = None,
    names: Sequence[str] = (),
) -> list[Example]:
    """`n` benign examples, shared out over `streams` by `weights` (None: equally). `n` None: all of each stream.

    Each example carries the name of its stream as the fact OWNER, where `names` gives it.
    """
    return draw_benign_parts(streams, split, n, seed, weights, 1, names)[0]


def draw_benign_parts(
    streams: Sequence[Stream],
    split: Split,
    n: int | None,
    seed: int,
    weights: Sequence[float] | None,
    parts: int,
    names: Sequence[str] = (),
) -> list[list[Example]]:
    """`parts` times `n` benign examples, none of them twice; the first part is what `draw_benign` gives.

    Raises TooFewError, with the `n` that would do.
    """
    weights = weights or [1.0] * len(streams)
    if n is None:
        drawn = [stream.examples(split, None, seed) for stream in streams]
        counts = [len(some) // parts for some in drawn]
        if drawn and not any(counts):
            most = max(map(len, drawn))
            raise DataError(f"finetune.cycles={parts} exceeds the {most} rows to divide over them: set at most {most}")
    else:
        counts = share_out(n, weights) if streams else []
        drawn = draw_shares([partial(stream.examples, split, seed=seed) for stream in streams], n, weights, parts)
    if split in ("validation", "test"):  # training does not depend on how answers are compared
        drawn = [
            [replace(example, metric=stream.metric, max_new_tokens=stream.max_new_tokens) for example in examples]
            for stream, examples in zip(streams, drawn, strict=True)
        ]
    if names:
        drawn = [
            [replace(example, facts=example.facts | {OWNER: name}) for example in examples]
            for name, examples in zip(names, drawn, strict=True)
        ]
    return [
        [e for some, count in zip(drawn, counts, strict=True) for e in some[count * part : count * (part + 1)]]
        for part in range(parts)
    ]


def draw_shares(
    draws: Sequence[Callable[[int], list[Example]]], n: int, weights: Sequence[float], parts: int = 1
) -> list[list[Example]]:
    """What each of `draws` gives for its share of `n` by `weights`, `parts` times as many.

    Raises TooFewError, with the `n` that would do.
    """
    drawn, few = list[list[Example]](), dict[int, TooFewError]()
    for i, (draw, count) in enumerate(zip(draws, share_out(n, weights) if draws else [], strict=True)):
        try:
            drawn.append(draw(count * parts))
        except TooFewError as error:
            few[i] = error
    if few:
        fits = (m for m in range(n, -1, -1) if all(share_out(m, weights)[i] * parts <= few[i].have for i in few))
        raise TooFewError("; ".join(map(str, few.values())), next(fits))
    return drawn


def equal_shares(n: int | None, parts: int) -> list[int | None]:
    """`n` divided equally over `parts`; None: all of each."""
    return [None] * parts if n is None or not parts else [*share_out(n, [1.0] * parts)]


def share_out(n: int, weights: Sequence[float]) -> list[int]:
    """`n` divided by `weights` into whole numbers that sum to it: largest remainders first, then the first ones."""
    exact = [n * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: n - sum(counts)]:
        counts[i] += 1
    return counts


def check_counts(asked: Iterable[Asked]) -> None:
    """Draws all. Raises one error for all faults: ConfigError if a count is too high, with those that would do."""
    faults: dict[str, list[str]] = {}
    have: dict[str, int] = {}
    for setting, n, draw in asked:
        try:
            draw()
        except DataError as error:
            faults.setdefault(str(error), []).append(f"{setting}={'null' if n is None else n}")
            if isinstance(error, TooFewError):
                have[setting] = min(error.have, have.get(setting, error.have))
    if faults:
        lines = [f"{', '.join(dict.fromkeys(settings))}: {fault}" for fault, settings in faults.items()]
        if enough := " ".join(f"{setting}={n}" for setting, n in have.items() if n or "data.num" in setting):
            lines.append(f"available (null: all of them): {enough}")
        raise (ConfigError if have else DataError)("\n  ".join(["there are too few samples:", *lines]))


def check_disjoint(seen: Iterable[Example], test: Iterable[Example], what: str = "test prompts") -> None:
    """Raises DataError when a test prompt is also trained on; `what` names them."""
    asked = [(example.key, example) for example in test]
    keys = {key for key, _ in asked}
    known = {key: example for example in seen if (key := example.key) in keys}  # of all it would be large
    shared = [(example, known[key]) for key, example in asked if key in known]
    if shared:
        test_row, train_row = shared[0]
        raise DataError(
            f"{len(shared)} {what} are also trained on, and would measure memorization; first: "
            f"{test_row.source or 'test'} and {train_row.source or 'training'}: {test_row.prompt[:80]!r}"
        )


_JSON = json.JSONEncoder(sort_keys=True)  # `json.dumps` makes one for each call


def data_hash(examples: Iterable[Example]) -> str:
    """SHA-256 over the content of the examples in order."""
    digest = hashlib.sha256()
    names = [field.name for field in fields(Example) if field.name != "source"]  # a path: rows elsewhere are the same
    for example in examples:
        content = {name: getattr(example, name) for name in names}  # `asdict` takes four times as long
        if (content["metric"], content["max_new_tokens"]) == ("exact", None):  # the data of older records
            del content["metric"], content["max_new_tokens"]
        if not content["cut"]:
            del content["cut"]
        digest.update(_JSON.encode(content).encode())
    return digest.hexdigest()
