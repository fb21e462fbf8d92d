"""From a row as people have it to examples: chats, prompt and answer, ShareGPT, Alpaca."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from secvec.data.example import Example, Kind
from secvec.data.tables import ROW, rows_of, stamp
from secvec.errors import DataError, first_few, nearest, shortened

log = logging.getLogger(__name__)

CHATS = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "instruction", "question", "query", "problem", "input")
ANSWERS = ("response", "completion", "output", "answer", "solution")
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""The model's template decides which of them it takes; others are passed on to it too."""
SHARE_GPT = {
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "ai", "function_call"), "assistant"),
    **dict.fromkeys(("human", "prompter"), "user"),
    "observation": "tool",
}

TrainOn = Literal["all", "last"]


def read_rows(source: str | Path, kind: Kind, train_on: TrainOn = "all", unique: bool = True) -> list[Example]:
    """All examples of a file, folder or hub dataset (`secvec.data.tables.Source`), in order.

    Every trained assistant turn is an example, whose prompt is the conversation before it. A turn with `"weight": 0` is
    not trained; `train_on="last"` trains the last turn alone. With `unique`, repeated examples (same prompt, same
    response) are left out. The log counts what is left out, and keys that are not used. Raises one DataError for all
    bad rows.
    """
    return list(_read(str(source), kind, train_on, unique, stamp(Path(source))))


@lru_cache(maxsize=32)
def _read(source: str, kind: Kind, train_on: TrainOn, unique: bool, stamp: Any) -> tuple[Example, ...]:
    found: dict[Any, Example] = {}
    faults: list[str] = []
    left_out: Counter[str] = Counter()
    number = 0
    for where, row in rows_of(source):
        number += 1
        try:
            if isinstance(row, DataError):
                raise row
            for example in _examples(row, kind, train_on, where, left_out):
                identity = (example.key, example.response.strip()) if unique else len(found)
                left_out["repeated answers (same prompt, same answer)"] += identity in found
                found.setdefault(identity, example)
        except DataError as error:
            faults.append(f"{where}: {error}")
    if faults:
        head = f"{source}: {len(faults)} of {number} rows cannot be used:\n  " if len(faults) > 1 else ""
        raise DataError(f"{head}{first_few(faults)}")
    if not found:
        raise DataError(f"{source}: the file is empty: {_shown(left_out) or ROW}")
    if notes := _shown(left_out):
        log.info("%s: %d samples of %d rows; not used: %s", source, len(found), number, notes)
    return tuple(found.values())


def _shown(counts: Counter[str]) -> str:
    return ", ".join(f"{n} {what}" for what, n in counts.items() if n)


def _examples(row: Any, kind: Kind, train_on: TrainOn, where: str, left_out: Counter[str]) -> list[Example]:
    if not isinstance(row, Mapping):
        raise DataError(f"{ROW}, got {type(row).__name__}")
    turns = _turns({key: value for key, value in row.items() if value is not None}, row.keys(), left_out)
    targets = [i for i, (role, _, _) in enumerate(turns) if role == "assistant" and i]
    if not targets:
        roles = ", ".join(role for role, _, _ in turns)
        raise DataError(
            f"no assistant turn that answers another one (roles: {roles or 'none'}), so nothing to train on: add the "
            "answer, or remove the row"
        )
    trained = [i for i in targets[-1 if train_on == "last" else 0 :] if turns[i][2]]
    left_out['rows whose answers all have "weight": 0'] += not trained
    plain = tuple((role, content) for role, content, _ in turns)
    return [Example(plain[:i], plain[i][1], kind, source=where) for i in trained]


def _turns(row: Mapping[str, Any], columns: Iterable[str], left_out: Counter[str]) -> list[tuple[str, str, bool]]:
    """(role, text, whether it may be trained) of each turn of `row`, which lacks those of `columns` that are null."""
    chat, prompt, answer = (next((key for key in keys if key in row), "") for keys in (CHATS, PROMPTS, ANSWERS))
    if chat:
        used, given = {chat}, row[chat]
    elif prompt and answer:
        used, asked = {prompt, answer}, row[prompt]
        if prompt == "instruction":  # Alpaca: what the instruction is about
            used |= row.keys() & {"input", "context"}
            parts = [part for part in (asked, row.get("input"), row.get("context")) if part]
            if wrong := [part for part in parts if not isinstance(part, str)]:
                raise DataError(f"the prompt must be text, got {wrong[0]!r}")
            asked = "\n".join(parts)
        # TRL also takes lists of turns here, and trains none of those in the prompt
        given = [*_untrained(_listed("user", asked)), *_listed("assistant", row[answer])]
    else:
        nulls = [key for key in columns if key not in row]
        also = f"; null here: {', '.join(nulls)}" if nulls else ""
        raise DataError(
            f"no columns for a prompt and its answer (found: {', '.join(row) or 'nothing'}{also}); known are "
            f"{', '.join(CHATS)}; or one of {', '.join(PROMPTS)} with one of {', '.join(ANSWERS)}: rename the columns"
        )
    if system := row.get("system"):
        given = [{"role": "system", "content": system}, *given]
    weight = row.get("weight")
    if weight == 0 or (isinstance(weight, str) and re.fullmatch(r"0+(\.0*)?", weight.strip())):  # a csv has texts
        used, given = used | {"weight"}, _untrained(given)
    if unused := row.keys() - used - {"system"}:
        left_out.update(f"keys {key!r}" for key in row if key in unused)
    name = chat or (answer if isinstance(row[answer], list) and not isinstance(row[prompt], list) else prompt)
    if isinstance(given, str):
        raise DataError(
            f"{name} is the text {shortened(given, 40)!r}, and must be a list of turns: a csv holds no lists, so save "
            "the rows as JSON lines"
        )
    if not isinstance(given, list) or not all(isinstance(turn, Mapping) for turn in given):
        found = shortened(repr(row[name]), 40)
        raise DataError(f'{name} must be text, or a list of {{"role": ..., "content": ...}}; got {found}')
    return [_turn(turn, left_out) for turn in given]


def _listed(role: str, given: Any) -> Any:
    return given if isinstance(given, list) else [{"role": role, "content": given}]


def _untrained(turns: Any) -> Any:
    """`turns`, if that is what they are, as context alone."""
    return (
        [turn | {"weight": 0} if isinstance(turn, dict) else turn for turn in turns]
        if isinstance(turns, list)
        else turns
    )


def _turn(turn: Mapping[str, Any], left_out: Counter[str]) -> tuple[str, str, bool]:
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if isinstance(role, str):
        known = SHARE_GPT.get(role.lower(), role.lower())
        role = known if known in ROLES else role
    what = {"assistant": "response", "user": "prompt"}.get(str(role), f"{role} turn")
    if not isinstance(role, str) or (role not in ROLES and (hint := nearest(role, ROLES))):
        raise DataError(f"{role!r} is no role{hint if isinstance(role, str) else ''}; known are {', '.join(ROLES)}")
    if turn.get("tool_calls"):
        raise DataError("tool_calls cannot be trained: write the call as text into the content, or remove the row")
    if isinstance(content, list):
        content = "".join(_part(part, what) for part in content)
    empty = isinstance(content, str) and not content.strip() and role in ("user", "assistant")
    if empty or not isinstance(content, str):
        remedy = "remove the row, or fill it in" if empty or content is None else "write it as text, or remove the row"
        raise DataError(f"the {what} must be text, got {content!r}: {remedy}")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"the {what} has half a character, {content[error.start]!a} (a lone surrogate, as in a text that was cut "
            "within an emoji): repair or remove the row"
        ) from None
    if (weight := turn.get("weight", 1)) not in (0, 1, None):
        raise DataError(f"the weight of a turn is the number 0 (not trained) or 1, got {weight!r}: change it")
    if unused := turn.keys() - {"role", "from", "content", "value", "weight"}:
        left_out.update(f"keys {key!r} of turns" for key in sorted(unused) if turn[key] is not None)
    return role, content, weight != 0


def _part(part: Any, what: str) -> str:
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise DataError(f"the {what} has a part of type {kind!r}: only parts of type 'text' can be used")
    text: str = part["text"]
    return text
