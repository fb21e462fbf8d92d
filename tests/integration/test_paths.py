"""Folders with names as people have them: spaces, brackets, letters beyond ASCII, `=`, and `~`."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from commands import run_command

from secvec.models.tiny import build_tiny


@pytest.mark.parametrize("name", ["Modèle ü", "a (1)", "a=b", "it's", 'a"b', "a$b ü", "日本"])
def test_the_message_shows_what_to_type_and_that_is_read(name: str, tmp_path: Path) -> None:
    told = run_command("train.py", f"model.name_or_path={tmp_path / name}", "+plan=true", cwd=tmp_path)
    assert told.returncode == 2 and "Traceback" not in told.stderr
    typed = told.stderr.strip().rpartition("needs quotes, type ")[2]
    (argument,) = shlex.split(typed)
    read = run_command("train.py", "recipe=tiny", "model=hf", argument, "+plan=true", cwd=tmp_path)
    assert read.returncode == 2 and f"model.name_or_path={tmp_path / name}: no" in read.stderr


@pytest.mark.parametrize("text", ["seed=[1", "seed", "optimizer={a:1"])
def test_what_is_no_text_gets_no_quotes(text: str, tmp_path: Path) -> None:
    told = run_command("train.py", text, cwd=tmp_path)
    assert told.returncode == 2 and "needs quotes" not in told.stderr


def test_a_tilde_is_the_home_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    for part in build_tiny(["a word or two"] * 20, 0):
        part.save_pretrained(home / "model")
    yaml = tmp_path / "my" / "experiment" / "here.yaml"
    yaml.parent.mkdir(parents=True)
    yaml.write_text("# @package _global_\nmodel:\n  local_path: ~/model\n")
    common = ["recipe=tiny", "model=hf", "paths.outputs=~/out", "paths.cache=~/cache"]
    common += ["stage=infer", "evaluation.num_prompts=2"]
    for given in (["model.name_or_path=~/model"], ["experiment=here", "model.name_or_path=owner/name"]):
        command = ["--config-dir=my", *common, *given]
        done = run_command("train.py", *command, cwd=tmp_path, env={"HOME": str(home)})
        assert "no fine-tuned backbone in" in done.stderr and f"{home}/out/" in done.stderr, done.stderr
    assert not (tmp_path / "~").exists()
