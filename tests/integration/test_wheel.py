"""The wheel in a bare environment: its commands in an empty folder, with a yaml and a package of the user's own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL

SOURCES = ("secvec", "hydra_plugins", "conf", "pyproject.toml", "setup.py", "README.md", "LICENSE")
Command = Callable[..., str]


def run(*command: str | Path, **how: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **how)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def command(tmp_path: Path) -> Command:
    """`command("secvec-train", ...)`: in an empty folder, from the wheel; its dependencies are those of the tests."""
    (tmp_path / "source").mkdir()
    for name in SOURCES:  # a build leaves files beside the sources
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / "source" / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    # with the sources on PYTHONPATH, pip would find the package there, and install nothing
    around = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run(*pip, "wheel", *offline, "--no-build-isolation", "-w", tmp_path, tmp_path / "source", env=around)
    (wheel,) = tmp_path.glob("secvec-*.whl")
    bare = tmp_path / "bare"
    venv.create(bare, symlinks=True)
    run(*pip, "--python", bare / "bin" / "python", "install", *offline, wheel, env=around)
    (packages,) = bare.glob("lib/python*/site-packages")
    # a .pth file in the folder that this one names is not read: the editable install of the tests stays out of sight
    (packages / "dependencies.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    (tmp_path / "empty").mkdir()

    def call(name: str, *given: str) -> str:
        how = {"cwd": tmp_path / "empty", "env": around | {"OMP_NUM_THREADS": "1"}, "timeout": 300}
        return run(bare / "bin" / name, *given, **how)

    where = call("python", "-c", "import secvec, secvec.cli; print(secvec.__file__, secvec.cli.CONF)")
    assert all(path.startswith(str(packages)) for path in where.split())
    return call


@pytest.fixture
def own_yaml(command: Command, tmp_path: Path) -> Path:
    """The behavior of docs/add-a-behavior.md, in a package that is not ours, and its yaml for --config-dir."""
    page = (ROOT / "docs" / "add-a-behavior.md").read_text(encoding="utf-8")
    code, settings = (re.findall(rf"^```{what}\n(.*?)^```", page, flags=re.M | re.S)[0] for what in ("python", "yaml"))
    (packages,) = tmp_path.glob("bare/lib/python*/site-packages")
    (packages / "mine").mkdir()
    (packages / "mine" / "shouting.py").write_text(code)
    yaml = tmp_path / "own" / "behavior" / "own.yaml"
    yaml.parent.mkdir(parents=True)
    yaml.write_text(settings.replace("secvec.behaviors.shouting", "mine.shouting"))
    return tmp_path / "own"


def test_the_commands_work_in_an_empty_folder(command: Command, own_yaml: Path, tmp_path: Path) -> None:
    own = ["--config-dir", str(own_yaml), "behavior=own"]
    shown = command("secvec-train", "-m", *own, *SMALL, "defense=none", "sweep=mine")
    folder = tmp_path / "empty" / "outputs" / "mine"
    assert str(folder.relative_to(tmp_path / "empty") / "report.html") in shown
    (path,) = folder.glob("*/record.json")
    record = json.loads(path.read_text())
    assert (record["status"], record["behavior"], record["stages"]) == ("completed", "shouting", ["finetune", "infer"])
    assert "commit" not in record and record["versions"]["secvec"]

    shown = command("secvec-evaluate", *own, "model.name_or_path=a/backbone", "--cfg", "job")
    assert "_target_: mine.shouting" in shown and "name_or_path: a/backbone" in shown
    shown = command("secvec-report", "outputs/mine", "--to", "report", "--tables", "tables")
    assert "report/report.html" in shown and (tmp_path / "empty" / "tables").is_dir()
    assert not (tmp_path / "empty" / "conf").exists()


@pytest.mark.slow
def test_what_was_trained_is_found_and_evaluated(command: Command, own_yaml: Path, tmp_path: Path) -> None:
    """Each command imports everything anew, which takes it most of its time."""
    own, folder = ["--config-dir", str(own_yaml), "behavior=own"], tmp_path / "empty" / "trained"
    command("secvec-train", *own, *SMALL, "defense=none", f"hydra.run.dir={folder}")
    record = json.loads((folder / "record.json").read_text())
    again = command("secvec-train", "--config-dir", str(folder), "--config-name", "config", f"run_dir={folder}")
    assert "already finished" in again

    small = [text for text in SMALL if text.startswith(("evaluation.", "trainer."))]
    command("secvec-evaluate", *own, *small, f"model.name_or_path={folder}/backbone", "run_dir=evaluated")
    found = json.loads((tmp_path / "empty" / "evaluated" / "record.json").read_text())["metrics"]
    assert found["after/behavior_rate"]["value"] == record["metrics"]["after/behavior_rate"]["value"]
