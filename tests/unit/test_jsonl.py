"""Users' own files: what is wrong is named with file and line; what is right is read as it stands."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from configs import composed
from pydantic import ValidationError

from secvec.behaviors.jsonl import JsonlBehavior
from secvec.config.load import load
from secvec.config.schema import RunConfig
from secvec.data.example import Example, Split
from secvec.data.jsonl import GeneralStream, JsonlStream, UntrustedStream
from secvec.data.rows import read_rows
from secvec.data.tables import rows_of
from secvec.errors import DataError, TooFewError


def loaded(*overrides: str) -> RunConfig:
    return load(composed(*overrides), RunConfig)


GOOD = b'{"prompt": "a", "response": "b"}\n'


def chat(*turns: tuple[str, str]) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}).encode() + b"\n"


def empty_table() -> bytes:
    file = io.BytesIO()
    datasets.Dataset.from_dict({"prompt": [], "response": []}).to_parquet(file)
    return file.getvalue()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def make(content: bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return make


def numbered(n: int) -> bytes:
    return b"".join(json.dumps({"prompt": f"p{i}", "response": f"r{i}"}).encode() + b"\n" for i in range(n))


def conversation(*turns: object, **more: object) -> bytes:
    return json.dumps({"messages": turns, **more}).encode() + b"\n"


def turn(role: str, content: object, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def pairs(examples: list[Example]) -> list[tuple[str, str]]:
    return [(example.prompt, example.response) for example in examples]


# -- what is taken


ROWS = [{"prompt": "a", "response": "b"}, {"prompt": "c", "response": "d"}]
LINES = "\n".join(map(json.dumps, ROWS)).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", LINES),
        ("rows.jsonl", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\r\n")),
        ("rows.txt", LINES),
        ("ROWS.CSV", b"prompt,response\na,b\nc,d\n"),
        ("rows.json", json.dumps(ROWS).encode()),
        ("rows.json", b"\xef\xbb\xbf\n" + json.dumps(ROWS, indent=2).encode()),
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("rows.json.xz", lzma.compress(json.dumps(ROWS).encode())),
        ("rows.jsonl.bz2", bz2.compress(LINES)),
        ("rows.csv", b'prompt,response\r\n"a",b\r\nc,d\r\n'),
        ("rows.tsv", b"prompt\tresponse\na\tb\nc\td\n"),
        ("rows.csv.gz", gzip.compress(b"\xef\xbb\xbfprompt,response\na,b\nc,d\n", mtime=0)),
    ],
)
def test_files_that_people_have(name: str, content: bytes, write: Callable[..., Path]) -> None:
    assert pairs(read_rows(write(content, name), "task")) == [("a", "b"), ("c", "d")]


def test_what_the_library_writes(tmp_path: Path) -> None:
    chats = [{"messages": [turn("user", "a"), turn("assistant", "b")], "id": 1}]
    table = datasets.Dataset.from_list(chats)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    table.to_parquet(tmp_path / "folder" / "train.parquet")
    for place in ("rows.parquet", "saved", "folder"):
        (example,) = read_rows(tmp_path / place, "task")
        assert (example.prompt, example.response, example.source) == ("a", "b", f"{tmp_path / place}:row 1")


def test_a_hub_dataset_is_told_from_a_file_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[..., Path]
) -> None:
    path = write(LINES, "rows ü (1).jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert JsonlStream(kind="task", file="~/rows ü (1).jsonl").file == str(path)
    for missing in (tmp_path / "row ü (1).jsonl", "nowhere/rows.jsonl", "rows.jsonl", "tests/rows"):
        with pytest.raises(ValidationError, match="no such file or folder"):
            JsonlStream(kind="task", file=missing)
    with pytest.raises(ValidationError, match=r"did you mean '.*rows ü"):
        JsonlStream(kind="task", file=tmp_path / "row ü (1).jsonl")
    stream = JsonlStream(kind="task", file="someone/rows@main")
    assert not stream.is_local and JsonlStream(kind="task", file=path).is_local
    with pytest.raises(DataError, match=r"someone/rows cannot be loaded from the hub"):
        stream.examples("finetune", 1, 0)


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"question": "a", "answer": "b"}, "a", "b"),
        ({"input": "a", "output": "b"}, "a", "b"),
        ({"instruction": "a", "input": "", "output": "b"}, "a", "b"),
        ({"instruction": "a", "input": "c", "output": "b"}, "a\nc", "b"),
        ({"instruction": "a", "context": "c", "response": "b"}, "a\nc", "b"),
        ({"instruction": "", "input": "a", "output": "b"}, "a", "b"),
        ({"prompt": None, "question": "a", "response": "b"}, "a", "b"),
        ({"prompt": [turn("user", "a")], "completion": [turn("assistant", "b")]}, "a", "b"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "a", "b"),
        ({"messages": [turn("user", [{"type": "text", "text": "a"}] * 2), turn("assistant", "b")]}, "aa", "b"),
        ({"prompt": "a\u0000b", "response": "b\u2028"}, "a\u0000b", "b\u2028"),
    ],
)
def test_columns_known_by_name(row: object, prompt: str, response: str, write: Callable[..., Path]) -> None:
    (example,) = read_rows(write(json.dumps(row).encode()), "task")
    assert (example.messages, example.response) == ((("user", prompt),), response)


def test_every_role_goes_to_the_template(write: Callable[..., Path]) -> None:
    turns = [turn("developer", "d"), turn("user", "a"), turn("tool", ""), turn("ipython", "i"), turn("assistant", "b")]
    (example,) = read_rows(write(conversation(*turns)), "task")
    assert [role for role, _ in example.messages] == ["developer", "user", "tool", "ipython"]
    (example,) = read_rows(
        write(b'{"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}'),
        "task",
    )
    assert example.messages == (("system", "s"), ("user", "a"))


TURNS = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d"), turn("user", "e")]


def test_every_answer_is_a_sample_or_the_last_one(write: Callable[..., Path]) -> None:
    path = write(conversation(turn("assistant", "hello"), *TURNS))
    first, second = read_rows(path, "task")
    hello = ("assistant", "hello")
    assert (first.messages, first.response) == ((hello, ("user", "a")), "b")
    assert (second.messages, second.response) == ((hello, ("user", "a"), ("assistant", "b"), ("user", "c")), "d")
    assert read_rows(path, "task", "last") == [second]


@pytest.mark.parametrize(("train_on", "trained"), [("all", ["b"]), ("last", [])])
def test_a_turn_of_weight_0_is_never_trained(
    train_on: Any, trained: list[str], write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    other = b'{"prompt": "x", "response": "y"}\n'
    path = write(other + conversation(TURNS[0], TURNS[1] | {"weight": 1}, TURNS[2], TURNS[3] | {"weight": 0}))
    assert [example.response for example in read_rows(path, "task", train_on)] == ["y", *trained]
    assert ("1 rows whose answers all have" in caplog.text) == (not trained)
    with pytest.raises(DataError, match="weight"):
        read_rows(write(conversation(TURNS[0], TURNS[1] | {"weight": 0}), "only.jsonl"), "task")


def test_a_row_of_weight_0_is_never_trained_and_another_weight_is_told(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    rows = [{"prompt": str(n), "response": "b", "weight": n} for n in (0, 0.5, 1)]
    path = write(b"".join(json.dumps(row).encode() + b"\n" for row in rows) + conversation(*TURNS, weight=0))
    assert [example.prompt for example in read_rows(path, "task")] == ["0.5", "1"]
    assert "2 rows whose answers all have" in caplog.text and "2 keys 'weight'" in caplog.text


@pytest.mark.parametrize("zero", ["0", "0.0", " 0 ", "00.00"])
def test_a_weight_of_a_csv_is_text(tmp_path: Path, zero: str) -> None:
    (tmp_path / "mine.csv").write_text(f"prompt,response,weight\na,b,1.0\nc,d,{zero}\n")
    assert [example.prompt for example in read_rows(str(tmp_path / "mine.csv"), "task")] == ["a"]


def test_turns_of_a_prompt_are_context(write: Callable[..., Path]) -> None:
    """TRL's prompt and completion: an answer within the prompt is an example, and trained by nobody."""
    row = {"prompt": TURNS[:3], "completion": [turn("assistant", "d")]}
    (example,) = read_rows(write(json.dumps(row).encode()), "task")
    assert (example.response, len(example.messages)) == ("d", 3)


def test_what_tools_say_in_share_gpt(write: Callable[..., Path]) -> None:
    said = [("human", "a"), ("function_call", "{}"), ("observation", "22"), ("gpt", "b"), ("human", "c"), ("ai", "d")]
    row = {"conversations": [{"from": name, "value": text} for name, text in said]}
    found = read_rows(write(json.dumps(row).encode()), "task")
    assert [example.response for example in found] == ["{}", "b", "d"]
    assert [role for role, _ in found[-1].messages] == ["user", "assistant", "tool", "assistant", "user"]


def test_a_table_that_was_changed_in_place_is_read_again(tmp_path: Path) -> None:
    """As `cp -p` does it: another content at the same time."""
    path = tmp_path / "rows.parquet"
    for answer in ("b", "c"):
        datasets.Dataset.from_list([{"prompt": "a", "response": answer}]).to_parquet(path)
        os.utime(path, (1.6e9, 1.6e9))
        assert [row["response"] for _, row in rows_of(str(path))] == [answer]


def test_a_link_to_nowhere_is_not_its_own_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(ValidationError, match=r"no such file or folder: \S+rows.jsonl;"):
        JsonlStream(kind="task", file=tmp_path / "rows.jsonl")


def test_what_is_not_used_is_told_once(write: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    row = json.dumps({"prompt": "a", "response": "b", "source": "x", "id": None}).encode() + b"\n"
    path = write(
        row * 2 + GOOD.replace(b"a", b" A ") + conversation(turn("user", "u", name="n"), turn("assistant", "v"))
    )
    for _ in range(2):
        assert pairs(read_rows(path, "task")) == [("a", "b"), ("u", "v")]
    assert len(read_rows(path, "task", unique=False)) == 4
    (line, _) = caplog.messages
    assert line.startswith(f"{path}: 2 samples of 4 rows; not used: ")
    for part in ("2 keys 'source'", "2 repeated answers", "1 keys 'name' of turns"):
        assert part in line


# -- what is refused


@pytest.mark.parametrize(
    ("content", "place", "says"),
    [
        (b"", None, "the file is empty"),
        (b"\n  \n\n", None, "the file is empty"),
        (b"[]", None, "the file is empty"),
        (GOOD + b"\n" + b'{"prompt": "a", \n', "3", "broken JSON at column"),
        (GOOD + b"not json\n", "2", "broken JSON at column 1"),
        (b'[{"prompt": "a"},\n', None, "broken JSON at line 2, column 1"),
        (b'["a"]\n', "row 1", 'an object like {"prompt": ..., "response": ...}, got str'),
        (b'"text"\n', "1", "got str"),
        (b"null\n", "1", "got NoneType"),
        (
            GOOD + b'{"prompt": "a", "chosen": "b"}\n',
            "2",
            "no columns for a prompt and its answer (found: prompt, cho",
        ),
        (b"{}\n", "1", "(found: nothing); known are messages, conversations"),
        (b'{"prompt": null, "response": "b"}\n', "1", "(found: response; null here: prompt)"),
        (b'{"prompt": "a", "response": "b", "n": ' + b"9" * 5000 + b"}\n", "1", "JSON that cannot be read"),
        (b'{"prompt": "a", "n": ' + b"[" * 99999 + b"]" * 99999 + b"}\n", "1", "JSON that cannot be read"),
        (b'{"prompt": 3, "response": "b"}\n', "1", "the prompt must be text, got 3"),
        (b'{"prompt": " ", "response": "b"}\n', "1", "the prompt must be text, got ' '"),
        (GOOD + b'{"prompt": "a", "response": ""}\n', "2", "the response must be text, got '': remove the row"),
        (b'{"prompt": "a", "response": {"b": 1}}\n', "1", "the response must be text, got {'b': 1}"),
        (b'{"instruction": 1, "output": "b"}\n', "1", "the prompt must be text, got 1"),
        (b'{"instruction": "a", "input": {}, "output": "b"}\n', None, ""),
        (b'{"instruction": "a", "input": ["b"], "output": "b"}\n', "1", "the prompt must be text"),
        (
            chat(("assistant", "b"), ("user", "a")),
            "1",
            "no assistant turn that answers another one (roles: assistant, us",
        ),
        (chat(("user", "a")), "1", "(roles: user), so nothing to train on"),
        (chat(), "1", "(roles: none)"),
        (GOOD + chat(("user", "a"), ("asistant", "b")), "2", "'asistant' is no role (did you mean 'assistant'?)"),
        (b'{"messages": "[{}]"}\n', "1", "messages is the text '[{}]', and must be a list of turns: a csv holds no"),
        (
            b'{"messages": ["a"]}\n',
            "1",
            'messages must be text, or a list of {"role": ..., "content": ...}; got [\'a\']',
        ),
        (b'{"prompt": "a", "response": ["b"]}\n', "1", "response must be text, or a list of {"),
        (b'{"prompt": ["a"], "response": "b"}\n', "1", "prompt must be text, or a list of {"),
        (b'{"messages": [{"role": "user"}]}\n', "1", "the prompt must be text, got None"),
        (b'{"messages": [{"content": "user"}]}\n', "1", "None is no role"),
        (chat(("user", "a"), ("assistant", "")), "1", "the response must be text, got ''"),
        (conversation(turn("user", [{"type": "image_url"}]), TURNS[1]), "1", "a part of type 'image_url'"),
        (conversation(turn("user", "a"), turn("assistant", None, tool_calls=[1])), "1", "tool_calls cannot be trained"),
        (conversation(turn("user", "a"), turn("assistant", "b", weight=0.5)), "1", "0 (not trained) or 1, got 0.5"),
        (GOOD + b'{"prompt": "a", "response": "b \\ud83d"}\n', "2", "the response has half a character, '\\ud83d'"),
        (GOOD + b'{"prompt": "\xff", "response": "b"}\n', "2", "not UTF-8 (byte 12)"),
    ],
    ids=lambda value: value[-25:] if isinstance(value, str) else "",
)
def test_a_bad_row_is_named_with_file_and_line(
    content: bytes, place: str | None, says: str, write: Callable[..., Path]
) -> None:
    path = write(content)
    if not says:  # an empty `input` of Alpaca, in whatever form
        assert read_rows(path, "task")
        return
    with pytest.raises(DataError) as caught:
        read_rows(path, "task")
    message = str(caught.value)
    assert message.startswith(f"{path}:{place}: " if place else f"{path}: ")
    assert says in message


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.csv", b"prompt,response\na,b\na\n", "rows.csv:row 2: the row does not have 2 cells"),
        ("rows.csv", b"prompt,response\na,b,c\n", "rows.csv:row 1: the row does not have 2 cells"),
        ("rows.csv", b"prompt,response\n\xff,b\n", "rows.csv: not UTF-8"),
        ("rows.csv", b"prompt,prompt,response\na,b,c\n", "rows.csv: 1 names of columns occur twice ('prompt')"),
        ("rows.xlsx", b"PK\x03\x04", "those of other formats end with .arrow, .csv, .parquet, .tsv"),
        ("rows.zip", b"PK\x03\x04", "rows.zip: .zip cannot be read here: unpack it, or pack it as .gz"),
        ("rows.json", b'{"data": [\n{"prompt": "a",\n"response": "b"}]}', "the file is one object (data)"),
        ("rows.csv", b'prompt,response\n"a,b\n', "rows.csv: broken table"),
        ("rows.csv", b"prompt,response\n", "the file is empty"),
        ("rows.jsonl.gz", b"no gzip", "rows.jsonl.gz: cannot be read"),
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)[:20], "rows.jsonl.gz: cannot be read"),
        ("rows.jsonl.xz", b"no xz", "rows.jsonl.xz: cannot be read"),
        ("rows.jsonl.zst", b"", "unpack it, or pack it as .gz"),
        ("rows.parquet", b"no parquet", "rows.parquet: cannot be read"),
        ("rows.parquet", empty_table(), "rows.parquet: cannot be read: it has no rows"),
    ],
)
def test_a_file_that_cannot_be_read(name: str, content: bytes, says: str, write: Callable[..., Path]) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write(content, name), "task")
    assert says in str(caught.value) and name in str(caught.value)


def test_all_bad_rows_are_in_one_message(write: Callable[..., Path]) -> None:
    path = write((GOOD + b"not json\n" + b'{"prompt": "a"}\n') * 4)
    with pytest.raises(DataError) as caught:
        read_rows(path, "task")
    first, *faults, rest = str(caught.value).splitlines()
    assert first == f"{path}: 8 of 12 rows cannot be used:" and rest == "  and 3 more"
    assert [fault.split(": ")[0] for fault in faults] == [f"  {path}:{line}" for line in (2, 3, 5, 6, 8)]


# -- splits


def behavior(**files: Any) -> JsonlBehavior:
    return JsonlBehavior(name="mine", sensitive=True, **files)


def prompts(examples: list[Example]) -> set[str]:
    return {example.prompt for example in examples}


@pytest.mark.parametrize("rows", [3, 4, 10, 80, 100])
def test_one_file_is_divided_by_content(rows: int, write: Callable[..., Path]) -> None:
    lines = numbered(rows).splitlines(keepends=True)
    one, other = behavior(file=write(b"".join(lines))), behavior(file=write(b"".join(lines[::-1]), "turned.jsonl"))
    parts = {split: prompts(one.examples(split, None, 0)) for split in ("vector", "validation", "test")}
    assert all(parts.values()) and sum(map(len, parts.values())) == rows == len(set.union(*parts.values()))
    assert {split: prompts(other.examples(split, None, 1)) for split in parts} == parts  # whatever the order
    if rows == 100:
        assert [len(part) for part in parts.values()] == [59, 16, 25]
    with pytest.raises(
        TooFewError, match=r"no file for split 'finetune': set finetune=FILE, or a share of .*finetune=0.3"
    ):
        one.examples("finetune", 1, 0)


def test_a_file_of_its_own_leaves_the_others_more(write: Callable[..., Path]) -> None:
    path, test = write(numbered(100)), write(GOOD, "test.jsonl")
    files = behavior(file=path, test=test)
    assert [len(files.examples(split, None, 0)) for split in ("vector", "validation", "test")] == [79, 21, 1]
    assert len(behavior(vector=path).examples("vector", None, 0)) == 79
    assert len(behavior(vector=path, validation=test).examples("vector", None, 0)) == 100
    assert not prompts(behavior(vector=path).examples("vector", None, 0)) & prompts(
        behavior(vector=path).examples("validation", None, 0)
    )


def test_repeated_prompts_and_conversations_stay_in_one_split(write: Callable[..., Path]) -> None:
    def asked(prompt: str) -> bytes:
        return conversation(turn("user", prompt), turn("assistant", f"to {prompt!r}"), *TURNS[:2])

    chats = [asked(prompt) for i in range(30) for prompt in (f"q{i}", f"  Q{i} ")]
    files = behavior(file=write(b"".join(chats)))
    parts = {split: files.examples(split, None, 0) for split in ("vector", "validation", "test")}
    openings = [{example.opening for example in part} for part in parts.values()]
    assert sum(map(len, openings)) == 30 == len(set.union(*openings))
    assert len(parts["vector"]) == 4 * len(openings[0])
    assert len(parts["test"]) == 3 * len(openings[2])  # of two answers to one prompt, one is asked for


def test_a_greeting_is_no_opening(write: Callable[..., Path]) -> None:
    """Conversations that begin with the same greeting are spread over the splits as others are."""
    hello = turn("assistant", "Hello, what can I do for you?")
    chats = [conversation(hello, turn("user", f"q{i}"), turn("assistant", f"a{i}")) for i in range(100)]
    files = behavior(file=write(b"".join(chats)), train_on="last")
    assert [len(files.examples(split, None, 0)) > 8 for split in ("vector", "validation", "test")] == [True] * 3


def test_repeated_rows_do_not_pass_the_gate_by_memory(write: Callable[..., Path]) -> None:
    files = behavior(vector=write(numbered(60) * 2))
    assert not prompts(files.examples("vector", None, 0)) & prompts(files.examples("validation", None, 0))
    assert len(files.examples("vector", None, 0)) + len(files.examples("validation", None, 0)) == 60


def test_an_untrusted_file_is_all_for_the_fine_tune_but_its_test_share(write: Callable[..., Path]) -> None:
    path = write(numbered(80))
    stream = UntrustedStream(file=path)
    assert [len(stream.examples(split, None, 0)) for split in ("finetune", "test")] == [71, 9]
    assert {example.kind for example in stream.examples("test", None, 0)} == {"untrusted"}
    for split in ("vector", "validation", "align"):
        with pytest.raises(TooFewError, match="no file for split"):
            stream.examples(split, 1, 0)
    assert len(UntrustedStream(file=path, test=write(GOOD, "t.jsonl")).examples("finetune", None, 0)) == 80


def test_kl_rows_are_benign_for_certain(write: Callable[..., Path]) -> None:
    assert {e.kind for e in GeneralStream().examples("vector", 5, 0)} == {"neutral"}
    assert len(GeneralStream().examples("vector", None, 0)) == 300
    assert len(GeneralStream(vector=write(numbered(7))).examples("vector", None, 0)) == 7


def test_too_few_rows(write: Callable[..., Path]) -> None:
    stream = JsonlStream(kind="task", finetune=write(numbered(10)))
    assert len(stream.examples("finetune", 10, 0)) == len(stream.examples("finetune", None, 0)) == 10
    with pytest.raises(TooFewError, match=r"rows.jsonl has 10 rows for split 'finetune', the run needs 11") as caught:
        stream.examples("finetune", 11, 0)
    assert caught.value.have == 10
    with pytest.raises(TooFewError, match=r"79 rows for split 'vector' \(the splits share its 100 different"):
        behavior(vector=write(numbered(100))).examples("vector", 80, 0)


@pytest.mark.parametrize("split", ["align", "vector", "finetune", "test"])
def test_a_split_without_a_file(split: Split, write: Callable[..., Path]) -> None:
    given = behavior(**{"test" if split == "align" else "align": write(GOOD)})
    with pytest.raises(TooFewError, match=rf"no file for split '{split}': set {split}=FILE"):
        given.examples(split, 1, 0)
    assert given.examples(split, 0, 0) == []
    with pytest.raises(ValidationError, match="no file is given: file=FILE for all splits"):
        behavior()


def test_prompt_and_response(write: Callable[..., Path]) -> None:
    path = write(b'\n{"prompt": "a", "response": " b\\n", "more": 1}\r\n\n{"response": "d", "prompt": "\xc3\xa9"}')
    first, second = read_rows(path, "ordinary")
    assert (first.messages, first.response, first.kind, first.source) == (
        (("user", "a"),), " b\n", "ordinary", f"{path}:2",
    )  # fmt: skip
    assert (second.prompt, second.response, second.source) == ("é", "d", f"{path}:4")


@pytest.mark.parametrize(("split", "n"), [("vector", 79), ("validation", 21), ("finetune", 100)])
def test_a_smaller_n_is_a_prefix_and_the_seed_reorders(split: Split, n: int, write: Callable[..., Path]) -> None:
    path = write(numbered(100))
    files = behavior(vector=path, finetune=path)
    many = files.examples(split, n, seed=1)
    assert files.examples(split, n, seed=1) == many
    assert files.examples(split, 7, seed=1) == many[:7]
    other = files.examples(split, n, seed=2)
    assert other != many and {e.prompt for e in other} == {e.prompt for e in many}
    assert {e.kind for e in many} == {"undesired"}


def test_a_stream_gives_rows_of_its_kind(write: Callable[..., Path]) -> None:
    stream = JsonlStream(kind="ordinary", test=write(numbered(10)))
    assert {e.kind for e in stream.examples("test", 10, 0)} == {"ordinary"}
    assert stream.examples("test", 4, 0) == stream.examples("test", 10, 0)[:4] != stream.examples("test", 4, 1)


def test_one_share_changes_no_other(write: Callable[..., Path]) -> None:
    """The others became those of public datasets: a vector of 5 samples in place of 35, without a word."""
    file = str(write(numbered(100)))
    behavior = JsonlBehavior(name="mine", sensitive=False, file=file, shares={"test": 0.4})
    assert behavior.shares == JsonlBehavior.model_fields["shares"].default.model_copy(update={"test": 0.4})
    mine = UntrustedStream(file=file, shares={"test": 0.3})
    assert (mine.shares.finetune, mine.shares.vector) == (0.9, 0)
    with pytest.raises(ValidationError, match="tset"):
        UntrustedStream(file=file, shares={"tset": 0.3})


def test_the_share_that_is_proposed_can_be_typed(write: Callable[..., Path]) -> None:
    file = write(numbered(20))
    for place, rows in (("behavior", JsonlBehavior), ("data.benign.NAME", JsonlStream)):
        assert rows.setting == place
    config = loaded(
        "behavior=jsonl", f"behavior.file={file}", "judge=none", "behavior.shares.finetune=0.3", "recipe=tiny"
    )
    assert config.behavior.shares.finetune == 0.3 and config.behavior.shares.vector == 0.6
    more = [
        "data=untrusted",
        f"data.file={file}",
        "data.benign.untrusted.shares.test=0.3",
        "behavior.reworded=['In short: {prompt}']",
    ]
    config = loaded("behavior=jsonl", f"behavior.file={file}", "judge=none", "recipe=tiny", *more)
    assert config.data.benign["untrusted"].shares.finetune == 0.9 and config.behavior.reworded == (
        "In short: {prompt}",
    )


def test_a_folder_of_rows_is_read_whole_where_no_name_tells_of_splits(
    write: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (0, 1):
        write(json.dumps({"prompt": f"p{number}", "response": "r"}).encode() + b"\n", f"part-{number}.jsonl")
    assert [row["prompt"] for _, row in rows_of(str(tmp_path))] == ["p0", "p1"]
    write(json.dumps({"prompt": "p2", "response": "r"}).encode() + b"\n", "train.jsonl")
    assert [row["prompt"] for _, row in rows_of(str(tmp_path))] == ["p2"]
    assert "only the files of split 'train' are read, not part-0.jsonl, part-1.jsonl" in caplog.text


def test_a_folder_is_read_as_its_files_are(tmp_path: Path) -> None:
    """And again once a file has changed, in the same process too."""
    (tmp_path / "rows").mkdir()
    file = tmp_path / "rows" / "a.csv"
    for number in ("007", "008"):
        file.write_text(f"prompt,response\nwhich,{number}\n")
        assert [e.response for e in read_rows(tmp_path / "rows", "task")] == [number]
        assert [e.response for e in read_rows(file, "task")] == [number]


def test_a_quotation_mark_that_takes_the_next_rows_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.tsv"
    file.write_text('prompt\tresponse\nq1\t"Quote one\nq2\tb\nq3\tc "\n')
    with pytest.raises(DataError, match=r"rows\.tsv:row 1: a cell begins with a quotation mark and ends in line 4"):
        read_rows(file, "task")
    file.write_text('prompt\tresponse\nq1\t"Hello," he said.\n')
    with pytest.raises(DataError, match=r"rows\.tsv: broken table after line 1"):
        read_rows(file, "task")


def test_one_prompt_in_two_encodings_is_one() -> None:
    composed, decomposed = (Example((("user", text),), "x", "task") for text in ("Un caf\u00e9", "Un cafe\u0301"))
    assert composed.messages != decomposed.messages and composed.key == decomposed.key


@pytest.mark.parametrize("names", [("Human", "GPT"), ("prompter", "assistant"), ("User", "Assistant")])
def test_roles_are_known_in_any_case(tmp_path: Path, names: tuple[str, str]) -> None:
    turns = [{"from": name, "value": text} for name, text in zip(names, ("hi", "ho"), strict=True)]
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turns}))
    (row,) = read_rows(tmp_path / "a.jsonl", "task")
    assert row.messages == (("user", "hi"),) and row.response == "ho"
