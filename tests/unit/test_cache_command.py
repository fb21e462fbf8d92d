"""The cache, listed and cleaned by a command."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from conftest import ROOT
from filelock import FileLock

from secvec.errors import ConfigError
from secvec.runs.__main__ import KINDS, main
from secvec.runs.cache import MARK, cached, prepare_cache


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    prepare_cache(tmp_path / "cache")
    for name, days in (("vectors/old", 40), ("vectors/new", 0), ("models/old", 40)):
        folder = tmp_path / "cache" / name
        cached(folder, lambda out: (out.mkdir(), (out / "weights").write_bytes(b"x" * 1_000_000)))  # type: ignore[arg-type, return-value]
        used = time.time() - days * 86400
        os.utime(folder, (used, used))
    return tmp_path / "cache"


def left(cache: Path) -> set[str]:
    return {path.relative_to(cache).as_posix() for path in cache.glob("*/*") if path.suffix != ".lock"}


def test_it_is_listed_by_kind_and_nothing_is_removed(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cache", str(cache)]) == 0
    lines = [line.split()[:4] for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [["models", "1", "1.0", "MB"], ["vectors", "2", "2.0", "MB"]]
    assert left(cache) == {"vectors/old", "vectors/new", "models/old"}


@pytest.mark.parametrize(
    ("asked", "stays"),
    [
        (["--days", "30"], {"vectors/new"}),
        (["--days", "30", "--kind", "vectors"], {"vectors/new", "models/old"}),
        ([], set()),
    ],
)
def test_what_is_asked_for_is_removed_with_its_lock(cache: Path, asked: list[str], stays: set[str]) -> None:
    assert main(["--cache", str(cache), "--remove", *asked]) == 0
    assert left(cache) == stays and len(list(cache.glob("*/*.lock"))) == len(stays)


def test_what_a_run_is_making_stays(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FileLock(f"{cache / 'vectors' / 'old'}.lock"):
        assert main(["--cache", str(cache), "--remove"]) == 0
    assert "removed 2 entries, 2.0 MB; 1 are in use" in capsys.readouterr().out and left(cache) == {"vectors/old"}


def test_a_folder_that_is_no_cache_keeps_all(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A repository has a folder `models` too."""
    (cache / MARK).unlink()
    assert main(["--cache", str(cache), "--remove"]) == 2
    assert f"is no cache of runs (it holds no {MARK})" in capsys.readouterr().err and len(left(cache)) == 3
    prepare_cache(cache)
    assert main(["--cache", str(cache), "--remove", "--days", "nan"]) == 2 and len(left(cache)) == 3


def test_a_cache_that_cannot_be_made_is_a_fault_of_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(ConfigError, match=r"paths\.cache=.* cannot be a folder \(.*\): give another one"):
            prepare_cache(tmp_path / place)


@pytest.mark.parametrize("name", [".old.x1y2", "old.part"])
def test_the_folder_of_a_build_in_progress_stays(cache: Path, name: str) -> None:
    """It has another name than the lock that its run holds; the run ended with FileNotFoundError."""
    (cache / "vectors" / name).mkdir()
    with FileLock(f"{cache / 'vectors' / 'old'}.lock"):
        assert main(["--cache", str(cache), "--remove"]) == 0
    assert left(cache) == {"vectors/old", f"vectors/{name}"}
    assert main(["--cache", str(cache), "--remove"]) == 0 and not left(cache)


def test_an_entry_of_a_cache_that_may_only_be_read_is_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("secvec.runs.cache.FileLock", None)
    assert cached(cache / "vectors" / "old", lambda out: pytest.fail("made again")).is_dir()


def test_every_folder_that_the_package_writes_is_listed() -> None:
    sources = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "secvec").rglob("*.py"))
    written = set(re.findall(r'paths\.cache / "(\w+)"', sources))
    assert {"models", "vectors", "activations"} <= written <= KINDS.keys()


def test_what_is_used_counts_as_new(cache: Path) -> None:
    cached(cache / "vectors" / "old", lambda _: None)
    assert main(["--cache", str(cache), "--remove", "--days", "30"]) == 0
    assert left(cache) == {"vectors/old", "vectors/new"}


def test_a_folder_without_a_cache_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--cache", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no cache of runs" in capsys.readouterr().err
