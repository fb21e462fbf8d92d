"""Shared by all tests: composed configs, a small aligned base built once, no network."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline", WANDB_SILENT="true")

from configs import composed

from secvec.config.load import load
from secvec.config.schema import AnyConfig, RunConfig
from secvec.runs.folder import RunFolder
from secvec.runs.record import Record
from secvec.tracking.base import Trackers

if TYPE_CHECKING:  # the process that hands out the tests to the workers needs no torch: it would wait for it
    from secvec.run import Run

ROOT = Path(__file__).parent.parent

# A script's `&` has SIGINT ignored, by us and by all that we start, and then no test of an interruption can pass.
signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = ("models", "vectors", "cycles", "answers", "tokens")
"""Parts of the cache that all tests share."""

# The whole method in seconds: enough to run every line of it, not enough to show the effect.
SMALL = [
    "model.align.num_undesired=60",
    "model.align.num_benign=120",
    "model.align.epochs=1",
    "model.align.gate=null",
    "model.align.num_threads=1",  # two workers, each with two threads that spin, are ten times as slow on two cores
    "vector.num_samples=16",
    "vector.num_kl=16",
    "vector.epochs=2",
    "vector.batch_size=8",
    "vector.kl_batch_size=8",
    "vector.gate.num_prompts=4",
    "vector.gate.min_behavior_rate=0",
    "vector.gate.min_loss_drop=null",
    "data.num_harmful=16",
    "data.num_benign=16",
    "finetune.epochs=2",
    "finetune.batch_size=8",
    "telemetry.every_n_steps=4",
    "telemetry.num_samples=4",
    "evaluation.validation.num_samples=4",
    "evaluation.num_prompts=6",
    "evaluation.max_new_tokens=24",
    "evaluation.num_leak_prompts=0",  # they are a third of an evaluation: see LEAKS
    "num_threads=1",
]


LEAKS = "evaluation.num_leak_prompts=2"
"""For the tests that look at leak probes."""


def run_of(config: AnyConfig) -> Run:
    """A run that has not begun: nothing is written to its folder."""
    from secvec.run import Run

    return Run(config, RunFolder(Path(config.run_dir), Record(key=config.key)), Trackers())


@pytest.hookimpl(trylast=True)  # after `-m` has left some out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two workers begin with a half of the list each: with files of tests that train, so that short tests come last.

    All that start commands are in one half: its worker alone starts the server that these are forked from.
    """
    first, second, short = list[pytest.Item](), list[pytest.Item](), list[pytest.Item]()
    for item in items:
        folder = item.path.parent.name
        commands = folder == "integration" or hasattr(item.module, "run_command")  # type: ignore[attr-defined]
        (first if commands else short if folder == "unit" else second).append(item)
    room = max(0, len(items) // 2 - len(first))
    items[:] = [*first, *short[:room], *second, *short[room:]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Bitwise comparisons hold at a fixed number of threads; tests run side by side."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where small bases, vectors and answers are cached: one folder for all workers, which wait for each other."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared-cache"
    for part in SHARED:
        (folder / part).mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def cache(tmp_path: Path, shared_cache: Path) -> Path:
    """`paths.cache` of a test. No test takes a fine-tuned backbone from another: what would it test?"""
    folder = tmp_path / "cache"
    folder.mkdir()
    for part in SHARED:
        (folder / part).symlink_to(shared_cache / part)
    return folder


@pytest.fixture
def make_config(tmp_path: Path, cache: Path) -> Callable[..., RunConfig]:
    """`make_config("defense=none", ..., run="a")`: a small run in a folder of this test."""

    def make(*overrides: str, run: str = "run", small: bool = True) -> RunConfig:
        where = [f"run_dir={tmp_path / run}", f"paths.cache={cache}"]
        return load(composed(*(SMALL if small else []), *where, *overrides), RunConfig)

    return make
