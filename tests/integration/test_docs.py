"""What README and docs say can be done: every command composes and validates, the walk-throughs run."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import secvec.behaviors
import secvec.defenses
from secvec.config.load import EvaluateConfig, RunConfig, load
from secvec.config.resolvers import register_resolvers
from secvec.run import train

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def commands() -> list[str]:
    shell = [
        line
        for page in PAGES
        for block in blocks(page, "(?:bash)?")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return sorted({line.split("  #")[0].strip() for line in shell if line.startswith(("python ", "make "))})


def test_there_are_commands() -> None:
    assert {"make demo", "make test"} <= set(commands()) and len(commands()) > 10


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    subprocess.run([*shlex.split(command.split("&&")[0]), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("command", [c for c in commands() if re.match(r"python (train|evaluate)\.py", c)])
def test_python_commands_compose_and_validate(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script, *arguments = shlex.split(command)[1:]
    choices = [a if "=[" in a else a.split(",")[0] for a in arguments if not a.startswith("-")]
    for file in re.findall(r"=([\w./-]+\.jsonl)", command):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("")
    for folder in re.findall(r"vector\.path=([\w./-]+)", command):
        Path(folder).mkdir(parents=True, exist_ok=True)
    if any(name in command for name in ("shouting", "label_smoothing")):
        pytest.skip("made in the walk-through, which test_the_walk_throughs_run runs")
    GlobalHydra.instance().clear()
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        name = script.removesuffix(".py")
        load(compose(name, [*choices, "run_dir=x"]), RunConfig if name == "train" else EvaluateConfig)


def test_the_walk_throughs_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., RunConfig]
) -> None:
    """docs/add-a-behavior.md and docs/add-a-defense.md, taken literally."""
    for package, group, page in (
        (secvec.behaviors, "behavior", "add-a-behavior.md"),
        (secvec.defenses, "defense", "add-a-defense.md"),
    ):
        name = re.search(r"_target_: secvec\.\w+\.(\w+)\.", blocks(ROOT / "docs" / page, "yaml")[0])
        assert name is not None
        for place, language, suffix in (
            (tmp_path / group, "python", "py"),
            (tmp_path / "conf" / group, "yaml", "yaml"),
        ):
            place.mkdir(parents=True)
            (place / f"{name[1]}.{suffix}").write_text(blocks(ROOT / "docs" / page, language)[0])
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path / group)])
    record = train(
        make_config(f"hydra.searchpath=[file://{tmp_path / 'conf'}]", "behavior=shouting", "defense=label_smoothing")
    )
    assert record["behavior"] == "shouting" and record["metrics"]["after/behavior_rate"]["n"] == 6
    assert "train/nll" in (Path(record["config"]["run_dir"]) / "metrics.csv").read_text()
