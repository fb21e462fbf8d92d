"""Imports go down only, and each big library has few doors."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

# From the bottom up; a module may import from lower layers and from its own package.
LAYERS = [
    {"secvec", "secvec.errors", "secvec.metrics"},
    {"secvec.runs", "secvec.settings"},
    {"secvec.models", "secvec.data", "secvec.report", "secvec.multirun"},
    {"secvec.training", "secvec.tracking"},
    {"secvec.judges", "secvec.defenses"},
    {"secvec.behaviors", "secvec.evaluation"},
    {"secvec.config", "secvec.stages"},
    {"secvec.module", "secvec.planning"},
    {"secvec.run"},
    {"secvec.cli"},
]
ENTRY_POINTS = {"hydra_plugins", "train", "evaluate"}
"""Above all layers."""
DOORS = {
    ("peft",): {"secvec.models.vector"},
    ("vllm",): {"secvec.evaluation.vllm"},
    ("hydra", "omegaconf"): {
        "secvec.config.load", "secvec.config.resolvers", "secvec.config.replay", "secvec.cli",
        "hydra_plugins.process_launcher",
        "hydra_plugins.search_sweeper",
    },
    ("submitit",): {"secvec.multirun.slurm"},
    ("optuna",): {"secvec.multirun.search"},
    ("lightning", "pytorch_lightning"): {
        "secvec.module", "secvec.evaluation.generation", "secvec.evaluation.prediction",
        "secvec.training.callbacks", "secvec.training.checkpoints", "secvec.settings.trainer",
        "secvec.evaluation.during_training", "secvec.training.telemetry", "secvec.training.trainer", "secvec.run",
        "secvec.data.datamodule", "secvec.tracking.lightning",
    },
    ("wandb", "wandb_workspaces"): {"secvec.tracking.wandb", "secvec.tracking.dashboard"},
}  # fmt: skip


def modules() -> dict[str, Path]:
    files = [*ROOT.glob("secvec/**/*.py"), *ROOT.glob("hydra_plugins/**/*.py"), ROOT / "train.py", ROOT / "evaluate.py"]
    names = (file.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for file in files)
    return dict(zip((name.removesuffix(".__init__") for name in names), files, strict=True))


MODULES = modules()


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Every import of a module that happens when it runs; those for type checkers alone are left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from statements(child)


def imported(source: str) -> set[str]:
    """Full names of the modules that `source` imports."""
    found: set[str] = set()
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, "relative import"
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in MODULES else str(node.module)
                for a in node.names
            }
    return found


IMPORTS = {name: imported(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def layer(name: str) -> int:
    """By the longest prefix that a layer names."""
    known = {prefix: number for number, prefixes in enumerate([*LAYERS, ENTRY_POINTS]) for prefix in prefixes}
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        if prefix in known and (length > 1 or len(parts) == 1 or prefix != "secvec"):
            return known[prefix]
    raise AssertionError(f"{name} is in no layer: add it to LAYERS")


def package(name: str) -> str:
    return ".".join(name.split(".")[:2]) if name.count(".") > 1 or MODULES[name].name == "__init__.py" else name


def test_the_parser_sees_imports_wherever_they_stand() -> None:
    source = (
        "import peft.utils\nfrom secvec import stages\nfrom secvec.errors import DataError\n"
        "def f():\n    try:\n        from torch import nn\n    except ImportError:\n        import wandb\n"
        "if TYPE_CHECKING:\n    import matplotlib\n"
    )
    assert imported(source) == {"peft.utils", "secvec.stages", "secvec.errors", "torch", "wandb"}
    assert len(MODULES) > 40 and "secvec.data.prompts" in IMPORTS["secvec.evaluation.evaluator"]


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name: str) -> None:
    ours = {other for other in IMPORTS[name] if other in MODULES}
    upward = {other for other in ours if layer(other) >= layer(name) and package(other) != package(name)}
    assert not upward, f"{name} (layer {layer(name)}) imports {sorted(upward)}"


def test_there_is_no_cycle() -> None:
    try:
        list(TopologicalSorter({name: IMPORTS[name] & MODULES.keys() - {name} for name in MODULES}).static_order())
    except CycleError as error:
        pytest.fail(str(error))


def test_only_the_report_knows_the_report() -> None:
    """A multirun starts it as a process; a run calls the page of a scan alone."""
    inside = {name for name in MODULES if name.partition("secvec.report")[1]}
    assert len(inside) > 10 and any(IMPORTS[name] & inside for name in inside)
    users = {name: found & inside for name, found in IMPORTS.items() if name not in inside and found & inside}
    assert users == {"secvec.run": {"secvec.report.scan_page"}}


MOST_PARAMETERS = 7


def too_long(source: str) -> list[str]:
    """Functions with more parameters than MOST_PARAMETERS; self and cls do not count."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            args = node.args
            every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
            if len([a for a in every if a and a.arg not in ("self", "cls")]) > MOST_PARAMETERS:
                found.append(node.name)
    return found


def test_no_function_takes_more_than_seven_parameters() -> None:
    assert too_long("def f(self, a, b, c, d, e, *, g, **h): pass") == []
    assert too_long("class A:\n    def f(self, a, b, c, d, e, g, *h, i): pass") == ["f"]
    found = {name: too_long(file.read_text(encoding="utf-8")) for name, file in MODULES.items()}
    assert not {name: functions for name, functions in found.items() if functions}


@pytest.mark.parametrize("libraries", DOORS, ids="/".join)
def test_a_big_library_has_few_doors(libraries: tuple[str, ...]) -> None:
    users = {name for name, found in IMPORTS.items() if any(i.partition(".")[0] in libraries for i in found)}
    assert users, "nobody imports it: the test looks for the wrong thing"
    assert users <= DOORS[libraries], sorted(users - DOORS[libraries])


SHARED = {"secvec.judges.cache", "secvec.judges.local_model"}
"""Bases that several plug-ins share and no yaml names."""


@pytest.mark.parametrize("folder", ["defenses", "behaviors", "judges"])
def test_plug_ins_do_not_know_each_other(folder: str) -> None:
    plugins = {name for name in MODULES if name.startswith(f"secvec.{folder}.")}
    assert len(plugins) > 1
    for name in plugins:
        assert IMPORTS[name] & plugins - {f"secvec.{folder}.base", *SHARED, name} == set(), name


def test_nobody_but_yaml_names_a_plug_in() -> None:
    """A new defense or behavior is one file and one yaml: nothing else may know the ones there are."""
    plugins = {
        n for n in MODULES if n.startswith(("secvec.defenses.", "secvec.behaviors.")) and not n.endswith(".base")
    }
    known = {name: found & plugins for name, found in IMPORTS.items() if found & plugins}
    assert not known


def test_no_module_is_a_drawer() -> None:
    names = {part for name in MODULES for part in name.split(".")}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def test_reports_and_the_command_line_start_without_torch() -> None:
    light = [name for name in MODULES if name.startswith("secvec.report") and not name.endswith("__main__")]
    light += ["secvec.report.__main__", "secvec.errors", "secvec.runs.keys", "secvec.cli", "secvec.runs.console"]
    light += [name for name in MODULES if name.startswith(("secvec.multirun", "hydra_plugins"))]
    light += ["secvec.tracking.dashboard", "secvec.tracking.session", "secvec.runs.folder"]
    light += ["secvec.config.load", "secvec.config.schema"]
    code = f"""
import importlib, sys
for name in ("torch", "lightning", "transformers", "peft"):
    sys.modules[name] = None  # whoever imports it fails
for name in {light}:
    importlib.import_module(name)
try:
    importlib.import_module("secvec.training.losses")
except ImportError as error:
    print("stopped:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("stopped: ") and "torch" in done.stdout


def test_every_package_that_is_imported_is_a_dependency() -> None:
    """By name, of the package or of one of its extras: another package that needs it today may not tomorrow."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: of for name, of in project["optional-dependencies"].items() if name != "dev"}
    named = [*project["dependencies"], *(one for of in extras.values() for one in of)]
    declared = {canonicalize_name(Requirement(one).name) for one in named}
    # what they take or return: torch arrays, lightning bars, pydantic faults, omegaconf and hydra yaml, ...
    declared |= {"numpy", "tqdm", "lightning-utilities", "pydantic-core", "pyyaml", "huggingface-hub", "markupsafe"}
    imported = set()
    for path in [*(ROOT / "secvec").rglob("*.py"), *(ROOT / "hydra_plugins").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).partition(".")[0])
    distributions = packages_distributions()
    others = imported - sys.stdlib_module_names - {"secvec", "hydra_plugins"}
    found = {name: {canonicalize_name(of) for of in distributions.get(name, [name])} for name in others}
    missing = [name for name in others if not found[name] & declared]
    assert not missing, f"declare them in pyproject.toml: {sorted(missing)}"


def test_the_citation_has_the_version_of_the_package() -> None:
    assert f"version: {version('secvec')}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
