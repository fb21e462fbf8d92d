"""Shared by all tests: composed configs, a small aligned base built once, no network."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="offline", WANDB_SILENT="true")

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from secvec.config.load import load
from secvec.config.resolvers import register_resolvers
from secvec.config.schema import AnyConfig, RunConfig
from secvec.run import Run
from secvec.runs.folder import RunFolder
from secvec.runs.record import Record
from secvec.tracking.base import Trackers

ROOT = Path(__file__).parent.parent

# A script's `&` has SIGINT ignored, by us and by all that we start, and then no test of an interruption can pass.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The whole method in seconds: enough to run every line of it, not enough to show the effect.
SMALL = [
    "model.align.num_undesired=60",
    "model.align.num_benign=120",
    "model.align.epochs=1",
    "model.align.gate=null",
    "model.align.num_threads=1",  # two workers, each with two threads that spin, are ten times as slow on two cores
    "vector.num_samples=24",
    "vector.num_kl=24",
    "vector.epochs=2",
    "vector.batch_size=12",
    "vector.kl_batch_size=12",
    "vector.gate.num_prompts=4",
    "vector.gate.min_behavior_rate=0",
    "data.num_harmful=24",
    "data.num_benign=24",
    "finetune.epochs=2",
    "finetune.batch_size=12",
    "telemetry.every_n_steps=2",
    "telemetry.num_samples=4",
    "evaluation.num_prompts=6",
    "evaluation.max_new_tokens=24",
    "evaluation.num_leak_prompts=2",
    "num_threads=1",
]


def run_of(config: AnyConfig) -> Run:
    """A run that has not begun: nothing is written to its folder."""
    return Run(config, RunFolder(Path(config.run_dir), Record(key=config.key)), Trackers())


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Bitwise comparisons hold at a fixed number of threads; tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the small base is cached, shared by all tests of a worker."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def make_config(tmp_path: Path, cache: Path) -> Callable[..., RunConfig]:
    """`make_config("defense=none", ..., run="a")`: a small run in a folder of this test."""

    def make(*overrides: str, run: str = "run", small: bool = True) -> RunConfig:
        GlobalHydra.instance().clear()
        register_resolvers()
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            where = [f"run_dir={tmp_path / run}", f"paths.cache={cache}"]
            return load(compose("train", [*(SMALL if small else []), *where, *overrides]), RunConfig)

    return make
