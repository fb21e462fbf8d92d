"""What README, docs and the comments in conf/ say can be done: every command composes, the walk-throughs run."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from configs import composed
from conftest import ROOT, run_of
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

import secvec.behaviors
import secvec.defenses
import secvec.judges
from secvec.config.load import load
from secvec.config.replay import replay_yaml
from secvec.config.resolvers import register_resolvers
from secvec.config.schema import EvaluateConfig, RunConfig
from secvec.data.datamodule import SecVecDataModule
from secvec.data.example import Example
from secvec.judges.base import Judgement
from secvec.run import train

README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
YAML = sorted((ROOT / "conf").rglob("*.yaml"))
ENTRY = re.compile(r"(python (train|evaluate)\.py|secvec-(train|evaluate))\b")
MADE_IN_A_PAGE = ("shouting", "label_smoothing")
"""Plug-ins of the walk-throughs."""


def blocks(page: Path, *languages: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [text for language, text in fenced if language in languages]


def commands() -> list[str]:
    """Those in blocks, and those in the text and in comments that are whole and without a placeholder."""
    lines = [
        line for page in PAGES for block in blocks(page, "bash", "") for line in block.replace("\\\n", " ").splitlines()
    ]
    lines = [line.split("  #")[0].strip() for line in lines]
    prose = [re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S) for page in PAGES]
    comments = [re.sub(r"\\\n# +", " ", file.read_text(encoding="utf-8")).replace("\n# ", " ") for file in YAML]
    inline = [" ".join(text.split()) for part in (*prose, *comments) for text in re.findall(r"`([^`]+)`", part)]
    inline = [part for text in inline if not re.search(r"\.\.\.|\[key", text) for part in text.split(" && ")]
    return sorted(
        {line for line in (*lines, *inline) if line.startswith("make ") or re.match(r"python \S+ |secvec-", line)}
    )


COMMANDS = commands()
RUNS = [command for command in COMMANDS if ENTRY.match(command) and " " in command.removeprefix("python ")]


def test_there_are_commands() -> None:
    assert {"make demo", "make test"} <= set(COMMANDS) and len(RUNS) > 80
    assert any("--config-dir" in command for command in RUNS) and any("ablation" in command for command in RUNS)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "log.md"], ids=lambda page: page.name)
def test_a_page_with_commands_says_what_comes_before_them(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "source .venv/bin/activate" in text or not re.search(
        r"python (train|evaluate)\.py|python -m|python bench", text
    )


def test_the_readme_is_short() -> None:
    """Code and tables included."""
    assert len(README.read_text(encoding="utf-8").split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text("utf-8"), flags=re.M)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in anchors, f"{target}: {sorted(anchors)}"


@pytest.mark.parametrize("page", [*PAGES, *YAML], ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    names = re.findall(
        r"`((?:secvec|conf|tests|hydra_plugins|sweeps|benchmarks|docs|examples)/[\w./-]*)`", page.read_text("utf-8")
    )
    made = [name for name in names if any(plugin in name for plugin in MADE_IN_A_PAGE)]
    assert not [name for name in names if name not in made and not (ROOT / name).exists()]
    assert names or page.name not in ("architecture.md", "glossary.md")


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("module", sorted({c.split()[2] for c in COMMANDS if c.startswith("python -m ")}))
def test_modules_that_run_exist(module: str) -> None:
    assert importlib.util.find_spec(module)


@pytest.mark.parametrize("command", RUNS)
def test_python_commands_compose_and_validate(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if any(name in command for name in MADE_IN_A_PAGE):
        pytest.skip("made in the walk-through, which test_the_walk_throughs_run runs")
    monkeypatch.chdir(tmp_path)
    entry = ENTRY.match(command)
    assert entry is not None
    name, given = entry[2] or entry[3], get_args_parser().parse_args(shlex.split(command[entry.end() :]))
    make_files(command, given.config_dir, name)
    with configs(given.config_dir):
        for overrides in each_value(given.overrides):
            load(compose(given.config_name or name, [*overrides, "run_dir=x"]), schema(name))


def configs(folder: str | None = None) -> initialize_config_dir:
    """The yaml files, with those of `--config-dir`."""
    GlobalHydra.instance().clear()
    register_resolvers()
    found = initialize_config_dir(str(ROOT / "conf"), version_base="1.3")
    if folder:
        loader: Any = GlobalHydra.instance().config_loader()
        loader.get_search_path().prepend("command-line", f"file://{Path(folder).resolve()}")
        loader.repository.initialize_sources(loader.get_search_path())
    return found


def schema(name: str) -> type[RunConfig] | type[EvaluateConfig]:
    return RunConfig if name == "train" else EvaluateConfig


def each_value(overrides: list[str]) -> list[list[str]]:
    """The overrides with the first value of each sweep; then with each other value of one of them."""
    axes = []
    for text, override in zip(overrides, OverridesParser.create().parse_overrides(overrides), strict=True):
        swept = override.is_discrete_sweep()
        axes.append(
            [f"{override.get_key_element()}={v}" for v in override.sweep_string_iterator()] if swept else [text]
        )
    first = [values[0] for values in axes]
    return [first, *([*first[:i], value, *first[i + 1 :]] for i, axis in enumerate(axes) for value in axis[1:])]


def make_files(command: str, config_dir: str | None, name: str) -> None:
    """The files and folders that a command names and that a reader has."""
    for file in re.findall(r"=([\w./-]+\.jsonl)", command):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text("")
    if "experiment=pirate" in command or "bench_smollm2" in command:
        for folder in ("data/pirate", "data/pirate_60"):
            subprocess.run([sys.executable, ROOT / "examples" / "pirate.py", folder], check=True)
    if "experiment=piqa" in command:  # which are downloaded
        Path("data/piqa").mkdir(parents=True)
        for name in ("bad", "near", "labelled"):
            rows = ({"prompt": f"{name} {n}", "response": "an answer"} for n in range(120))
            Path(f"data/piqa/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for folder in re.findall(r"([\w./-]+RUN/backbone)", command):  # of the built-in model
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text('{"secvec_recipe": "tiny"}')
    for folder in re.findall(r"vector\.path=([\w./-]+)", command):
        Path(folder).mkdir(parents=True, exist_ok=True)
    for block in (block for page in PAGES for block in blocks(page, "yaml")):  # `# my/logger/mlflow.yaml, used by: ...`
        if config_dir and (written := re.match(rf"# ({config_dir}/\S+\.yaml)", block)):
            Path(written[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(written[1]).write_text(block.partition("\n")[2])
    if config_dir and "--config-name" in command:
        Path(config_dir).mkdir(parents=True, exist_ok=True)
        settings = load(composed(root=name), schema(name)).composed
        (Path(config_dir) / "config.yaml").write_text(replay_yaml(settings))


def test_the_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., RunConfig]
) -> None:
    """Word for word, but for the data and the number of epochs."""
    run = run_of(make_config())
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run.backbone.folder, "my_model")
    (code,) = blocks(README, "python")
    assert "data = ..." in code
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    monkeypatch.setattr(L, "Trainer", lambda max_epochs=1, real=L.Trainer: real(max_epochs=min(max_epochs, 2), **quiet))
    found = {"data": SecVecDataModule.of(run.config)}
    exec(re.sub(r"^data = \.\.\..*$", "", code, flags=re.M), found)
    answers = found["answers"]
    assert len([row for batch in answers for row in batch]) == 4 * run.config.evaluation.num_prompts
    assert Path("run/vector/adapter_config.json").is_file() and Path("run/backbone/config.json").is_file()


def test_the_walk_throughs_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_config: Callable[..., RunConfig]
) -> None:
    """The pages on adding a behavior, a defense and a judge, taken literally."""
    for package, group, page in (
        (secvec.behaviors, "behavior", "add-a-behavior.md"),
        (secvec.defenses, "defense", "add-a-defense.md"),
        (secvec.judges, "judge", "add-a-judge.md"),
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
    added = ["behavior=shouting", "defense=label_smoothing", "judge=shouting"]
    config = make_config(f"hydra.searchpath=[file://{tmp_path / 'conf'}]", *added)
    assert config.judge is not None and config.judge.threshold == 0.5
    asked = [Example((("user", "How?"),), "So!", "undesired")] * 4
    assert config.judge.judge(asked, ["So! So? So!", "So.", "So", "What?!"]) == [
        Judgement("behavior", pytest.approx(2 / 3)), Judgement("wanted", 0.0), Judgement("other", 0.0),
        Judgement("behavior", 1.0),
    ]  # fmt: skip

    record = train(config)
    rate, score = (record["metrics"][f"after/behavior_{name}"] for name in ("rate", "score"))
    assert record["behavior"] == "shouting" and rate["n"] == score["n"] == 6
    rows = [json.loads(line) for line in (Path(config.run_dir) / "predictions.jsonl").read_text().splitlines()]
    undesired = [row for row in rows if row["stream"] == "undesired" and row["phase"] == "after"]
    assert [row["verdict"] for row in undesired] == [
        judgement.verdict for judgement in config.judge.judge(asked[:1] * 6, [row["response"] for row in undesired])
    ]
    with (Path(config.run_dir) / "metrics.csv").open() as file:
        curves = {(row["stage"], row["step"], row["metric"]): float(row["value"]) for row in csv.DictReader(file)}
    smoothed = {at[:2]: loss for at, loss in curves.items() if at[2] == "train/loss"}
    assert smoothed and all(loss != curves[*at, "train/nll"] for at, loss in smoothed.items())


def test_every_judge_of_the_table_and_the_text_is_there() -> None:
    page = (ROOT / "docs" / "add-a-judge.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`judge=(\w+) judge\.", page))
    assert named == {"classifier", "generative_classifier", "llm"}
    assert all((ROOT / "conf" / "judge" / f"{name}.yaml").is_file() for name in named)
