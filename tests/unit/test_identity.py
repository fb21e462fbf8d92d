"""What shapes a result is in every key, and nothing else is: each part of a folder changed, in place and in a copy."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from secvec.data.example import Example
from secvec.models.backbone import Backbone
from secvec.models.tiny import build_tiny
from secvec.runs import content
from secvec.runs.content import file_digest, folder_digest
from secvec.runs.keys import content_key, run_key
from secvec.stages.base import training_key

SHAPES = (
    "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "modeling_own.py", "parts/attention.py", "qwen.tiktoken", "adapter_model.bin",
    "additional_chat_templates/tool_use.jinja",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder whose name has a dot."""
    made = tmp_path / "Qwen2.5-0.5B"
    for part in build_tiny(["a word or two"] * 20, 0):
        part.save_pretrained(made)
    for name in SHAPES:
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).touch()
    (made / "README.md").write_text("about")
    return made


def keys(folder: Path) -> list[object]:
    settings = {"model": {"name_or_path": str(folder)}, "vector": {"path": str(folder)}, "task_folder": str(folder)}
    alone = [run_key({name: value}) for name, value in settings.items()]
    return [folder_digest(folder), *alone, run_key({"judge": {"model": str(folder)}})]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("copied", [False, True])
def test_a_changed_part_is_another_identity(folder: Path, tmp_path: Path, name: str, copied: bool) -> None:
    before, identity = keys(folder), Backbone.of(folder).identity
    changed = Path(shutil.copytree(folder, tmp_path / "copy")) if copied else folder
    content, stat = (changed / name).read_bytes(), (changed / name).stat()
    (changed / name).write_bytes(content[:-1] + bytes([(content or b" ")[-1] ^ 1]))
    os.utime(changed / name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not set(map(str, before)) & set(map(str, keys(changed)))
    if name.endswith(("generation_config.json", "jinja", "py")):
        assert Backbone.of(changed).identity != identity


def test_what_does_not_matter_is_not_in_it(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    (copy / "README.md").write_text("other")
    (copy / ".cache").mkdir()
    (copy / ".cache" / "notes").write_text("hidden")
    (copy / "checkpoint-3").mkdir()
    (copy / "checkpoint-3" / "model.safetensors").write_text("an older state")
    os.utime(copy / "config.json", (1, 1))
    assert keys(copy) == keys(folder)
    assert Backbone.of(copy).identity == Backbone.of(folder).identity


def test_data_files_and_task_folders_count_by_content(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "utils.data.txt").write_text("a")
    (tmp_path / "rows.jsonl").write_text("a")
    settings = {"data": {"benign": [{"file": str(tmp_path / "rows.jsonl")}]}, "task_folder": str(tmp_path / "tasks")}
    before = run_key(settings)
    for file in ("rows.jsonl", "tasks/utils.data.txt"):
        (tmp_path / file).write_text("b")
        assert run_key(settings) != before
        (tmp_path / file).write_text("a")
    assert run_key(settings) == before


@pytest.mark.parametrize(
    "name", ["file", "test_file", "kl_file", "benign_file", "align", "vector", "validation", "finetune", "test"]
)
def test_a_folder_of_rows_counts_by_content(tmp_path: Path, name: str) -> None:
    """Each setting that names rows may name a folder of files."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "part-1.jsonl").write_text("a")
    settings = {"data": {"benign": {"mine": {name: str(folder)}}}}
    before = run_key(settings)
    (folder / "part-1.jsonl").write_text("b")
    assert run_key(settings) != before
    (folder / "part-1.jsonl").write_text("a")
    copy = {"data": {"benign": {"mine": {name: str(folder.rename(tmp_path / "moved"))}}}}
    assert run_key(copy) == before


def test_the_card_of_a_dataset_counts_by_its_header(tmp_path: Path) -> None:
    """`datasets` reads there which files are a split's."""
    folder = tmp_path / "rows"
    folder.mkdir()
    (folder / "train.jsonl").write_text("a")
    card = folder / "README.md"
    header = "---\nconfigs:\n- config_name: main\n  data_files: train.jsonl\n---\n"
    digests = []
    for text in ("", "Words.\n", header, header.strip(), header + "Words.\n", header.replace("train", "other")):
        card.write_text(text)
        digests.append(folder_digest(folder))
    bare, words, first, at_the_end, with_words, other = digests
    assert bare == words != first == at_the_end == with_words != other
    (folder / ".huggingface.yaml").write_text("configs: []")  # it takes the place of the header
    assert folder_digest(folder) != other
    (folder / ".hidden").write_text("configs: []")
    both = folder_digest(folder)
    (folder / ".hidden").unlink()
    assert folder_digest(folder) == both


def test_whose_prompts_are_left_out_of_untrusted_tests_counts(tmp_path: Path) -> None:
    """Also in a run without a vector: its test rows are others."""

    def key(kind: str, rows: str) -> str:
        (tmp_path / "bad.jsonl").write_text(rows)
        behavior = {"behavior": {"file": str(tmp_path / "bad.jsonl")}, "r": len(rows)}
        streams = {"mine": {"kind": kind}, "gone": None}
        return run_key({"defense": {"uses_vector": False}, "vector": behavior, "data": {"benign": streams}})

    assert key("untrusted", "a") != key("untrusted", "bb") and key("task", "a") == key("task", "bb")


def test_a_word_that_is_also_a_folder_is_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = run_key({"vector": {"split": "vector"}})
    (tmp_path / "vector").mkdir()
    assert run_key({"vector": {"split": "vector"}}) == before


def test_a_large_file_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "LARGE", 1)
    monkeypatch.setattr(content, "SETTLED", -1e9)  # as if it had been written long ago
    file, keep, reads = tmp_path / "weights", tmp_path / "keep", list[Path]()
    read: Callable[[Path], str] = content._read
    monkeypatch.setattr(content, "_read", lambda path: reads.append(path) or read(path))
    file.write_text("one")
    first = file_digest(file, keep)
    assert file_digest(file) == first and len(reads) == 1
    content._digests.clear()  # another process
    assert file_digest(file, keep) == first and len(reads) == 1
    stat = file.stat()
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time of change
    assert file_digest(file, keep) != first and len(reads) == 2


def test_a_large_file_counts_by_content_where_its_digest_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that may only be read, or a full disk. It counted by its path: a changed file was "already finished"."""
    monkeypatch.setattr(content, "LARGE", 1)
    monkeypatch.setattr(content, "SETTLED", -1e9)
    (tmp_path / "cache").write_text("")  # no folder can be made below it
    file, keys = tmp_path / "mine.jsonl", set[str]()
    for rows in ("one", "two"):
        file.write_text(rows)
        content._digests.clear()
        keys.add(run_key({"data": {"file": str(file)}}, tmp_path / "cache" / "digests"))
    assert (len(keys) == 2 and keys.pop() == run_key({"data": {"file": str(file)}})) or len(keys) == 1


@pytest.mark.parametrize("role", ["judge", "answer_judge"])
def test_what_a_judge_has_judged_is_no_setting(tmp_path: Path, role: str) -> None:
    """Its cache grows with every run, which then would be found by no later one."""
    cache = tmp_path / "judgements.sqlite"
    settings = {role: {"name": "correctness", "cache": str(cache)}}
    before = run_key(settings)
    cache.write_bytes(b"1")
    assert run_key(settings) == before != run_key({role: {"name": "other", "cache": str(cache)}})


@pytest.mark.parametrize(("num", "counts"), [(8, True), (None, True), (0, False)])
def test_held_out_rows_count_where_a_callback_may_stop_by_them(num: int | None, counts: bool) -> None:
    """`num_samples=null` is all of them."""

    def key(answer: str) -> str:
        settings = {"optimizer": {"lr": 1e-3}}
        config = SimpleNamespace(
            evaluation=SimpleNamespace(validation=SimpleNamespace(num_samples=num)),
            callbacks={"early_stopping": {}},
            model_dump=lambda **_: {**settings, "optimizer": dict(settings["optimizer"])},
        )
        rows = {"undesired": [Example((("user", "How?"),), answer, "undesired")]}
        run: Any = SimpleNamespace(config=config, data=SimpleNamespace(validation=lambda n: {} if n == 0 else rows))
        backbone: Any = SimpleNamespace(identity=["a"])
        return training_key(run, backbone, [], {})

    assert (key("So.") != key("Thus.")) is counts


def test_another_version_of_the_package_is_another_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an older version trained or judged may be something else by the same settings."""
    run, artifact = run_key({"seed": 0}), content_key(["a"])
    monkeypatch.setattr("secvec.__version__", "999.0")
    assert run_key({"seed": 0}) != run and content_key(["a"]) != artifact


@pytest.mark.parametrize("part", ["behavior", "data", "vector", "scan", "model", "judge", "answer_judge"])
def test_a_file_counts_by_content_wherever_it_is_named(tmp_path: Path, part: str) -> None:
    keys = []
    for name, rows in (("rows", "a"), ("rows", "b"), ("elsewhere", "b")):
        (tmp_path / f"{name}.jsonl").write_text(rows)
        keys.append(run_key({part: {"test_file": str(tmp_path / f"{name}.jsonl")}}))
    assert keys[0] != keys[1] == keys[2]
