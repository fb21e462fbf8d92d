"""Users' own files: what is wrong is named with file and line; what is right is read as it stands."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from math import ceil
from pathlib import Path

import pytest

from secvec.behaviors.jsonl import JsonlBehavior
from secvec.data.example import Split
from secvec.data.jsonl import JsonlStream, read_jsonl
from secvec.errors import DataError

GOOD = b'{"prompt": "a", "response": "b"}\n'


def chat(*turns: tuple[str, str]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}).encode() + b"\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(content: bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return make


def numbered(n: int) -> bytes:
    return b"".join(json.dumps({"prompt": f"p{i}", "response": f"r{i}"}).encode() + b"\n" for i in range(n))


@pytest.mark.parametrize(
    ("content", "line", "says"),
    [
        (b"", None, "the file is empty"),
        (b"\n  \n\n", None, "the file is empty"),
        (GOOD + b"\n" + b'{"prompt": "a", \n', 3, "broken JSON at column"),
        (GOOD + b"not json\n", 2, "broken JSON at column 1"),
        (b'["a", "b"]\n', 1, 'an object like {"prompt": ..., "response": ...}, got list'),
        (b'"text"\n', 1, "got str"),
        (b"null\n", 1, "got NoneType"),
        (GOOD + b'{"prompt": "a", "answer": "b"}\n', 2, "missing response (there is: prompt, answer); a row has"),
        (b"{}\n", 1, "missing prompt and response (there is: nothing); a row has prompt and response, or messages"),
        (b'{"prompt": null, "response": "b"}\n', 1, "the prompt must be text, got None"),
        (b'{"prompt": 3, "response": "b"}\n', 1, "the prompt must be text, got 3"),
        (b'{"prompt": " ", "response": "b"}\n', 1, "the prompt must be text, got ' '"),
        (GOOD + b'{"prompt": "a", "response": ""}\n', 2, "the response must be text, got ''"),
        (b'{"prompt": "a", "response": ["b"]}\n', 1, "the response must be text, got ['b']"),
        (chat(("assistant", "b"), ("user", "a")), 1, "roles are assistant, user; expected user and assistant in turn"),
        (chat(("user", "a")), 1, "roles are user; expected"),
        (chat(("user", "a"), ("user", "a"), ("assistant", "b")), 1, "ending with assistant"),
        (chat(("user", "a"), ("system", "s"), ("assistant", "b")), 1, "roles are user, system, assistant; expected"),
        (chat(("system", "s")), 1, "roles are system; expected"),
        (chat(), 1, "roles are none; expected"),
        (GOOD + chat(("human", "a"), ("gpt", "b")), 2, "unknown role 'human'; allowed: system, user, assistant"),
        (b'{"messages": "a"}\n', 1, 'messages must be a list of {"role": ..., "content": ...}'),
        (b'{"messages": ["a"]}\n', 1, 'messages must be a list of {"role": ..., "content": ...}'),
        (b'{"messages": [{"role": "user"}]}\n', 1, 'messages must be a list of {"role": ..., "content": ...}'),
        (chat(("user", "a"), ("assistant", "")), 1, "the response must be text, got ''"),
        (GOOD + b'{"prompt": "\xff", "response": "b"}\n', 2, "not UTF-8 (byte 12)"),
    ],
    ids=lambda value: value[-25:] if isinstance(value, str) else "",
)
def test_a_bad_row_is_named_with_file_and_line(
    content: bytes, line: int | None, says: str, write: Callable[..., Path]
) -> None:
    path = write(content)
    with pytest.raises(DataError) as caught:
        read_jsonl(path, "task")
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert says in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone.jsonl: cannot be read"):
        read_jsonl(tmp_path / "gone.jsonl", "task")


def test_too_few_rows(write: Callable[..., Path]) -> None:
    stream = JsonlStream(kind="task", finetune=write(numbered(10)))
    assert len(stream.examples("finetune", 10, 0)) == 10
    with pytest.raises(DataError, match=r"rows.jsonl has 10 rows for split 'finetune', but the run needs 11"):
        stream.examples("finetune", 11, 0)


@pytest.mark.parametrize("rows", [1, 10])
def test_too_few_rows_because_some_are_held_out(rows: int, write: Callable[..., Path]) -> None:
    behavior = JsonlBehavior(name="mine", sensitive=True, vector=write(numbered(rows)))
    left = rows - len(behavior.examples("validation", ceil(rows / 5), 0))
    assert len(behavior.examples("vector", left, 0)) == left
    with pytest.raises(DataError) as caught:
        behavior.examples("vector", left + 1, 0)
    message = str(caught.value)
    assert f"rows.jsonl has {left} rows for split 'vector'" in message and f"but the run needs {left + 1}" in message
    assert "held out" in message  # else the number contradicts the file


@pytest.mark.parametrize("split", ["align", "vector", "finetune", "test"])
def test_a_split_without_a_file(split: Split) -> None:
    with pytest.raises(DataError, match=rf"no file for split '{split}': set behavior.{split}=FILE.jsonl"):
        JsonlBehavior(name="mine", sensitive=True).examples(split, 1, 0)
    assert JsonlBehavior(name="mine", sensitive=True).examples(split, 0, 0) == []


def test_the_remedy_for_a_benign_stream_can_be_typed() -> None:
    with pytest.raises(DataError) as caught:
        JsonlStream(kind="task").examples("finetune", 1, 0)
    assert "data.benign[" not in str(caught.value)  # no override that Hydra takes


def test_prompt_and_response(write: Callable[..., Path]) -> None:
    path = write(b'\n{"prompt": "a", "response": " b\\n", "more": 1}\r\n\n{"response": "d", "prompt": "\xc3\xa9"}')
    first, second = read_jsonl(path, "ordinary")
    assert (first.messages, first.response, first.kind, first.source) == (
        (("user", "a"),), " b\n", "ordinary", f"{path}:2",
    )  # fmt: skip
    assert (second.prompt, second.response, second.source) == ("é", "d", f"{path}:4")


def test_messages_with_a_system_turn_and_several_turns(write: Callable[..., Path]) -> None:
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    (example,) = read_jsonl(write(chat(*turns)), "task")
    assert example.messages == tuple(turns[:-1])
    assert (example.prompt, example.response) == ("c", "d")


def test_without_a_validation_file_every_fifth_row_is_held_out(write: Callable[..., Path]) -> None:
    path = write(numbered(20))
    behavior = JsonlBehavior(name="mine", sensitive=True, vector=path)
    vector = {e.prompt for e in behavior.examples("vector", 16, 0)}
    validation = {e.prompt for e in behavior.examples("validation", 4, 0)}
    numbers = sorted(int(prompt[1:]) for prompt in validation)
    assert [b - a for a, b in pairwise(numbers)] == [5, 5, 5]
    assert not vector & validation and len(vector | validation) == 20


def test_with_a_validation_file_nothing_is_held_out(write: Callable[..., Path]) -> None:
    behavior = JsonlBehavior(
        name="mine", sensitive=True, vector=write(numbered(20)), validation=write(GOOD, "validation.jsonl")
    )
    assert len(behavior.examples("vector", 20, 0)) == 20
    assert [e.prompt for e in behavior.examples("validation", 1, 0)] == ["a"]


@pytest.mark.parametrize(("split", "n"), [("vector", 80), ("validation", 20), ("finetune", 100)])
def test_a_smaller_n_is_a_prefix_and_the_seed_reorders(split: Split, n: int, write: Callable[..., Path]) -> None:
    path = write(numbered(100))
    behavior = JsonlBehavior(name="mine", sensitive=True, vector=path, finetune=path)
    many = behavior.examples(split, n, seed=1)
    assert behavior.examples(split, n, seed=1) == many
    assert behavior.examples(split, 7, seed=1) == many[:7]
    other = behavior.examples(split, n, seed=2)
    assert other != many and {e.prompt for e in other} == {e.prompt for e in many}
    assert {e.kind for e in many} == {"undesired"}


def test_a_stream_gives_rows_of_its_kind(write: Callable[..., Path]) -> None:
    stream = JsonlStream(kind="ordinary", test=write(numbered(10)))
    assert {e.kind for e in stream.examples("test", 10, 0)} == {"ordinary"}
    assert stream.examples("test", 4, 0) == stream.examples("test", 10, 0)[:4] != stream.examples("test", 4, 1)
