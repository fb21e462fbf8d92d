"""What the stages share: the run, what it asks its models, and what several processes train only once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from secvec.behaviors.base import Behavior
from secvec.config.load import AnyConfig, RunConfig
from secvec.data.draw import data_hash, draw_benign
from secvec.data.encode import Encoded
from secvec.data.example import Example
from secvec.data.tokens import encoded
from secvec.evaluation.evaluator import Probe, evaluate_model
from secvec.evaluation.generation import Source
from secvec.evaluation.leak_probes import leak_probes
from secvec.judges.base import Judge
from secvec.runs.cache import cached, main_process
from secvec.runs.console import metrics_table
from secvec.runs.files import atomic_path
from secvec.runs.record import RunFolder
from secvec.settings.schema import EvaluationSettings
from secvec.stages.align import Base
from secvec.tracking.base import Tracker
from secvec.training.trainer import device_of


@dataclass(frozen=True)
class Run:
    """What every stage needs."""

    config: RunConfig
    folder: RunFolder
    base: Base
    tracker: Tracker = field(default_factory=Tracker)

    @cached_property
    def tests(self) -> dict[str, list[Example]]:
        """Held-out examples by kind; the same for every stage and defense of a seed."""
        return test_sets(self.config)

    def rows(self, examples: Sequence[Example]) -> list[Encoded]:
        """Tokens of `examples`."""
        return encoded(examples, self.base.tokenizer, self.base.context, self.config.paths.cache)

    def ask(self, model: nn.Module, phase: str, source: Source) -> Probe:
        """Answers and metrics of `model` in the state `phase`; `source` writes what it answers."""
        with self._asking():
            return evaluate_model(self.placed(model), self.base.tokenizer, self.tests, *self._how, phase, source)

    def ask_held_out(self, model: nn.Module, held_out: Sequence[Example], source: Source) -> Probe:
        """What the gate of the vector looks at: the behavior that it was trained on, which judges itself."""
        config, tests = self.config, {"undesired": held_out}
        how = (config.vector.behavior, None) if config.vector.behavior else (config.behavior, config.judge)
        with self._asking():
            model = self.placed(model)
            return evaluate_model(model, self.base.tokenizer, tests, *how, config.evaluation, "gate", source)

    def ask_all(self, model: nn.Module, phase: str, source: Source) -> Probe:
        """Answers and metrics, and the leak probes."""
        return self.ask(model, phase, source) + self.leaks(model, phase, source)

    def leaks(self, model: nn.Module, phase: str, source: Source) -> Probe:
        """The leak probes of `model`."""
        with self._asking():
            return leak_probes(model, self.base.tokenizer, self.tests["undesired"], *self._how, phase, source)

    @property
    def _how(self) -> tuple[Behavior, Judge | None, EvaluationSettings]:
        return self.config.behavior, self.config.judge, self.config.evaluation

    def placed(self, model: nn.Module) -> nn.Module:
        """`model` on the device that evaluates."""
        return model.to(device_of(self.config.trainer))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Counts the seconds of evaluation: a part of the stages' own, to be kept small."""
        began, seconds = time.monotonic(), self.folder.record["wall_seconds"]
        yield
        seconds["evaluation"] = round(seconds.get("evaluation", 0.0) + time.monotonic() - began, 3)

    def keep(self, *probes: Probe) -> None:
        """Puts metrics and predictions into the run folder."""
        for probe in probes:
            self.folder.record["metrics"] |= probe.metrics
            self.folder.add_predictions(probe.predictions)

    def note_data(self, split: str, examples: Sequence[Example]) -> None:
        """Hash and counts of the data of a split, for the record."""
        kinds = [example.kind for example in examples]
        self.folder.record["data"]["sha256"][split] = data_hash(examples)
        self.folder.record["data"]["counts"][split] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def test_sets(config: AnyConfig) -> dict[str, list[Example]]:
    """`evaluation.num_prompts` held-out examples of each kind that the behavior and the benign streams have."""
    n = config.evaluation.num_prompts
    tests = {"undesired": config.behavior.examples("test", n, config.seed)}
    for kind in ("task", "ordinary"):
        streams = [stream for stream in config.data.benign if stream.kind == kind]
        if streams:
            tests[kind] = draw_benign(streams, "test", n, config.seed)
    if look_alikes := config.behavior.look_alikes(n, config.seed):
        tests["look_alike"] = look_alikes
    return tests


def trained_once(path: Path, train: Any) -> Path:
    """Like `cached`, for a training that all processes take part in: rank 0 looks and writes, the others follow it."""
    if main_process():
        cached(path, train)
    elif not path.is_dir():
        train(path)
    if dist.is_initialized():
        dist.barrier()  # rank 0 moves it into its place only after the last step that they share
    return path


def copy_folder(source: Path, target: Path) -> None:
    """A folder of the cache into the run folder."""
    if main_process():
        with atomic_path(target) as out:
            shutil.copytree(source, out)


def summary(run: Run, stage: str) -> str:
    """The table at the end of a stage."""
    shown = {"vector": ("gate/", "vector_on/", "vector_off/"), "finetune": ("suppression", "drift"), "infer": ("",)}[
        stage
    ]
    metrics = {n: m for n, m in run.folder.record["metrics"].items() if n.startswith(shown)}
    return metrics_table(f"{stage}: {run.folder.path}", metrics)
