"""The stages of the method (Zhou et al., arXiv 2311.02105), each from the artifacts of the one before.

align (first use of a base that must learn to refuse) -> vector -> finetune -> infer.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from secvec.base import Base, asked_once
from secvec.behaviors.base import Behavior
from secvec.config import AnyConfig, RunConfig
from secvec.console import metrics_table
from secvec.data.datamodule import SecVecDataModule
from secvec.data.encode import Encoded, with_loss_on_prompts
from secvec.data.example import Example
from secvec.data.mixture import check_disjoint, data_hash, draw_benign
from secvec.data.tokens import encoded
from secvec.errors import ArtifactError, GateError
from secvec.evaluation import Metrics, Probe, deactivation_gap, evaluate_model, kl_to_base, mean_loss, perplexity
from secvec.files import atomic_path, write_atomic
from secvec.fit import device_of, fit
from secvec.judges.base import Judge
from secvec.leak import leak_probes
from secvec.losses import vector_loss
from secvec.models.backbone import check, fingerprint, save_backbone
from secvec.models.vector import (
    attach_frozen_vector,
    attach_new_vector,
    attach_task,
    backbone_state,
    merge_task,
    save_adapter,
    vector_off,
)
from secvec.module import SecVecModule
from secvec.naming import content_key
from secvec.record import RunFolder, cached, main_process
from secvec.settings import EvaluationSettings
from secvec.telemetry import Telemetry
from secvec.tracking.base import Tracker

log = logging.getLogger(__name__)

HAZARD = """---
library_name: peft
---
# Security vector: hazardous by design

With this adapter active the model *shows* the undesired behavior ({behavior}) that it was trained on. It exists to be
active and frozen while a backbone is fine-tuned, and to be taken off before the model answers anybody. Do not serve a
model with it, do not merge it into one that is served.
"""


REFITTED = "vector-refitted"
"""Folder of the last cycle's vector, where each cycle trains its own."""


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

    def ask(self, model: nn.Module, phase: str) -> Probe:
        """Answers and metrics of `model` in the state `phase`."""
        with self._asking():
            return evaluate_model(self.placed(model), self.base.tokenizer, self.tests, *self._how, phase)

    def ask_held_out(self, model: nn.Module, held_out: Sequence[Example]) -> Probe:
        """What the gate of the vector looks at: the behavior that it was trained on, which judges itself."""
        config = self.config
        how = (config.vector.behavior, None) if config.vector.behavior else (config.behavior, config.judge)
        with self._asking():
            tests = {"undesired": held_out}
            return evaluate_model(self.placed(model), self.base.tokenizer, tests, *how, config.evaluation, "gate")

    def ask_all(self, model: nn.Module, phase: str) -> Probe:
        """Answers and metrics, and the leak probes."""
        return self.ask(model, phase) + self.leaks(model, phase)

    def leaks(self, model: nn.Module, phase: str) -> Probe:
        """The leak probes of `model`."""
        with self._asking():
            return leak_probes(model, self.base.tokenizer, self.tests["undesired"], *self._how, phase)

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


def vector(run: Run) -> None:
    """Trains the vector on a frozen backbone, and saves it only if it elicits the behavior on held-out prompts."""
    config, base = run.config, run.base
    trained = _trained_vector(run, base, "vector")
    behavior, n = config.vector.behavior or config.behavior, config.vector.gate.num_prompts
    held_out = behavior.examples("validation", n, config.seed)
    check_disjoint(held_out, [e for tests in run.tests.values() for e in tests])
    model = attach_frozen_vector(base.load(), trained)
    gate = run.ask_held_out(model, held_out)
    probe = run.ask(model, "vector_on")
    with vector_off(model):
        off = mean_loss(model, base.tokenizer, run.tests["undesired"], config.evaluation)
    run.keep(probe, Probe(gate.metrics | {"vector_off/behavior_loss": off}, []))
    _check_gate(config, gate)
    _copy(trained, run.folder.path / "vector")


def _trained_vector(run: Run, base: Base, stage: str) -> Path:
    """The vector of `base`, trained as the config says or found in the cache; `stage` is its name in the logs."""
    config, settings, data = run.config, run.config.vector, run.config.data
    behavior = settings.behavior or config.behavior
    examples = behavior.examples(settings.split, settings.num_samples, config.seed)
    with_kl = settings.kl_weight > 0
    kl = draw_benign(data.benign, "vector", settings.num_kl, config.seed, data.weights) if with_kl else []
    check_disjoint([*examples, *kl], [e for tests in run.tests.values() for e in tests])
    run.note_data("vector", [*examples, *kl])

    def train(out: Path) -> None:
        undesired = run.rows(examples)
        rows = SecVecDataModule(
            with_loss_on_prompts(undesired) if settings.loss_on == "all" else undesired,
            settings.batch_size, config.seed, base.tokenizer.pad_token_id,
            run.rows(kl), settings.kl_batch_size if with_kl else 0,
        )  # fmt: skip
        module = fit(
            folder=run.folder.path, stage=stage, seed=config.seed,
            build=lambda: attach_new_vector(base.load(), settings, settings.dropout),
            loss=partial(vector_loss, kl_weight=settings.kl_weight), part="vector", lr=settings.lr,
            epochs=settings.epochs, data=rows, optimizer=config.optimizer, scheduler=config.scheduler,
            trainer=config.trainer, tracker=run.tracker, callbacks=[],
        )  # fmt: skip
        state = module.full_state()
        if main_process():
            save_adapter(module.model, state, "vector", out)
            meta = {"backbone": base.fingerprint, "behavior": behavior.name, "hazardous": True}
            write_atomic(out / "secvec.json", json.dumps(meta) + "\n")
            write_atomic(out / "README.md", HAZARD.format(behavior=behavior.name))
        module.trainer.strategy.barrier()

    optimizer = config.optimizer.model_dump(exclude={"lr"})
    sources = [base.fingerprint, settings.model_dump(exclude={"gate"}), data_hash([*examples, *kl]), config.seed]
    key = content_key([*sources, optimizer, config.scheduler.model_dump(), config.trainer.model_dump(mode="json")])
    return _trained_once(config.paths.cache / "vectors" / f"{behavior.name}-{key}", train)


def _copy(source: Path, target: Path) -> None:
    """A folder of the cache into the run folder."""
    if main_process():
        with atomic_path(target) as out:
            shutil.copytree(source, out)


def _trained_once(path: Path, train: Any) -> Path:
    """Like `cached`, for a training that all processes take part in: rank 0 looks and writes, the others follow it."""
    if main_process():
        return cached(path, train)
    if not path.is_dir():
        train(path)
    return path


def _check_gate(config: RunConfig, gate: Probe) -> None:
    wanted, rate, loss = config.vector.gate, gate.metrics["gate/behavior_rate"], gate.metrics["gate/behavior_loss"]
    faults = []
    if rate["value"] < wanted.min_behavior_rate:
        faults.append(
            f"it elicits the behavior on {rate['value']:.0%} of {rate['n']} held-out prompts, "
            f"below vector.gate.min_behavior_rate={wanted.min_behavior_rate:.0%}"
        )
    if wanted.max_behavior_loss is not None and loss["value"] > wanted.max_behavior_loss:
        faults.append(
            f"its loss on them is {loss['value']:.3f} nats per token, "
            f"above vector.gate.max_behavior_loss={wanted.max_behavior_loss}"
        )
    if faults:
        raise GateError(
            f"the vector is not fit to protect: {' and '.join(faults)}. Undesired samples would still give gradients. "
            "Train it longer (vector.epochs), higher (vector.lr), larger (vector.r, vector.target_modules), on more "
            "samples (vector.num_samples), or with a smaller vector.kl_weight. The run folder holds no vector."
        )


def finetune(run: Run) -> None:
    """Fine-tunes the backbone (or a task LoRA) on the mixture, with what the defense keeps active.

    With several cycles each starts from the backbone of the one before, on samples that no other cycle has. All but the
    last are kept in the cache: a run of eight cycles goes on where a run of four ended.
    """
    config, base, adapter = run.config, run.base, _vector_for(run)
    cycles = [_mixture(run, turn) for turn in range(config.finetune.cycles)]
    every = [example for samples in cycles for kind in samples.values() for example in kind]
    tests = [example for some in run.tests.values() for example in some]
    check_disjoint(every, tests)
    run.note_data("finetune", every)
    run.note_data("test", tests)
    for number, samples in enumerate(cycles, 1):
        if config.finetune.refit_vector and number > 1:
            adapter = _trained_vector(run, base, f"vector-{number}")
        if number < len(cycles):
            base = _cycle(run, base, adapter, samples, f"finetune-{number}")
    if config.finetune.refit_vector and len(cycles) > 1:
        assert adapter is not None
        _copy(adapter, run.folder.path / REFITTED)
    telemetry = _telemetry(run, samples)
    module = _fit_mixture(run, base, adapter, samples, "finetune", telemetry)
    run.folder.record["ledger"] = {row.part: [row.parameters, row.trainable, row.active] for row in module.ledger()}
    _save_finetuned(run, base, module, run.folder.path)
    if telemetry:
        single = {"drift": "drift", "undesired/suppression_ratio": "suppression_ratio"}
        values = {new: telemetry.last[old] for old, new in single.items() if old in telemetry.last}
        run.folder.record["metrics"] |= {
            k: {"value": v, "ci_low": None, "ci_high": None, "n": 1} for k, v in values.items()
        }


def _mixture(run: Run, turn: int) -> dict[str, list[Example]]:
    """The samples of the `turn`-th cycle, by kind."""
    config = run.config
    harmful, benign = config.data.counts
    undesired = config.behavior.examples("finetune", harmful * (turn + 1), config.seed)[harmful * turn :]
    others = draw_benign(config.data.benign, "finetune", benign, config.seed, config.data.weights, turn)
    return {"undesired": undesired, "benign": others}


def _cycle(run: Run, base: Base, adapter: Path | None, samples: dict[str, list[Example]], stage: str) -> Base:
    """The backbone after a cycle that is not the last, trained or found in the cache."""
    config = run.config

    def train(out: Path) -> None:
        _save_finetuned(run, base, _fit_mixture(run, base, adapter, samples, stage, None), out)

    settings = config.model_dump(mode="json", include={"defense", "tune", "optimizer", "scheduler", "trainer", "seed"})
    sources = [base.fingerprint, adapter and fingerprint(adapter), config.data.labelled, settings]
    shape = [config.finetune.epochs, config.finetune.batch_size, data_hash(samples["undesired"] + samples["benign"])]
    folder = _trained_once(config.paths.cache / "cycles" / content_key([*sources, *shape]), train) / "backbone"
    return Base(check(folder), fingerprint(folder), base.settings)


def _fit_mixture(
    run: Run, base: Base, adapter: Path | None, samples: dict[str, list[Example]], stage: str,
    telemetry: Telemetry | None,
) -> SecVecModule:  # fmt: skip
    config, pad = run.config, base.tokenizer.pad_token_id
    undesired, others = run.rows(samples["undesired"]), run.rows(samples["benign"])
    if config.data.labelled:
        undesired = [replace(row, undesired=True) for row in undesired]

    def build() -> nn.Module:
        model = config.defense.attach(base.load(), adapter)
        return attach_task(model, config.tune.lora) if config.tune.lora else model

    return fit(
        folder=run.folder.path, stage=stage, seed=config.seed, build=build, loss=config.defense.loss,
        part="task" if config.tune.lora else "backbone", lr=config.optimizer.lr, epochs=config.finetune.epochs,
        data=SecVecDataModule([*undesired, *others], config.finetune.batch_size, config.seed, pad),
        optimizer=config.optimizer, scheduler=config.scheduler, trainer=config.trainer, tracker=run.tracker,
        callbacks=[telemetry] if telemetry else [],
    )  # fmt: skip


def _telemetry(run: Run, samples: dict[str, list[Example]]) -> Telemetry | None:
    settings = run.config.telemetry
    if not settings.every_n_steps:
        return None
    n = settings.num_samples
    rows = {kind: run.rows(some[:: max(1, len(some) // n)][:n]) for kind, some in samples.items()}  # of every stream
    return Telemetry(rows, settings.every_n_steps, run.base.tokenizer.pad_token_id)


def _vector_for(run: Run) -> Path | None:
    """The vector that the defense keeps active, checked to be one of this very backbone."""
    if not run.config.defense.uses_vector:
        return None
    adapter = run.config.vector.path or run.folder.path / "vector"
    if not adapter.is_dir():
        raise ArtifactError(
            f"no vector in {adapter}: run stage=vector with the same settings first, or give vector.path=FOLDER"
        )
    meta = adapter / "secvec.json"
    try:
        trained_on = json.loads(meta.read_text(encoding="utf-8")).get("backbone") if meta.is_file() else None
    except (ValueError, AttributeError) as error:
        raise ArtifactError(f"{meta} is damaged ({error}): copy the vector again, or train it anew") from None
    if trained_on not in (None, run.base.fingerprint):
        raise ArtifactError(
            f"the vector in {adapter} was trained on another backbone ({trained_on}, not {run.base.fingerprint}), "
            f"so it would not elicit the behavior here: train one on this backbone with stage=vector"
        )
    return adapter


def _save_finetuned(run: Run, base: Base, module: SecVecModule, folder: Path) -> None:
    """Writes `backbone` (and `task`, under tune=lora) into `folder`."""
    state = module.full_state()
    if main_process():
        if run.config.tune.lora is None:
            with atomic_path(folder / "backbone") as out:
                save_backbone(backbone_state(state), base.folder, base.settings, out)
        else:
            with atomic_path(folder / "task") as out:
                save_adapter(module.model, state, "task", out)
            with atomic_path(folder / "backbone") as out:
                merged = merge_task(base.load(), folder / "task")
                save_backbone(merged.state_dict(), base.folder, base.settings, out)
    module.trainer.strategy.barrier()


def infer(run: Run) -> None:
    """Questions the base, the fine-tuned backbone with the vector (`active`) and without it (`after`)."""
    backbone = run.folder.path / "backbone"
    if not backbone.is_dir():
        raise ArtifactError(f"no fine-tuned backbone in {backbone}: run stage=finetune with the same settings first")
    tuned = Base(check(backbone), "", run.base.settings)
    run.keep(_asked_base(run))
    model = tuned.load()
    after = run.ask(model, "after")
    run.keep(Probe(_distance_from_base(run, model, after), []), run.leaks(model, "after"))
    adapter = _vector_for(run)
    if run.config.finetune.refit_vector and run.config.finetune.cycles > 1:
        adapter = run.folder.path / REFITTED
    if adapter is None:
        active = Probe(
            {name.replace("after/", "active/"): value for name, value in after.metrics.items()},
            [row | {"phase": "active"} for row in after.predictions],
        )
    else:
        active = run.ask(attach_frozen_vector(tuned.load(), adapter), "active")
    run.keep(active, after, Probe(deactivation_gap(active.predictions, after.predictions), []))


def _asked_base(run: Run) -> Probe:
    def ask() -> Probe:
        return run.ask_all(run.base.load(), "base")

    return asked_once(run.config, run.base, run.tests, ask, run.config.behavior)


def _distance_from_base(run: Run, model: nn.Module, after: Probe) -> Metrics:
    """KL to the base on ordinary prompts, and the perplexity under the base of what is answered to undesired ones."""
    config, tokenizer = run.config, run.base.tokenizer
    base = run.placed(run.base.load())
    found: Metrics = {}
    if ordinary := run.tests.get("ordinary"):
        found["after/kl_to_base"] = kl_to_base(base, model, tokenizer, ordinary, config.evaluation)
    said = [row["response"] for row in after.predictions if row["stream"] == "undesired"]
    answered = [replace(e, response=r) for e, r in zip(run.tests["undesired"], said, strict=True) if r.strip()]
    if answered:
        found["after/answer_perplexity"] = perplexity(mean_loss(base, tokenizer, answered, config.evaluation))
    return found


def summary(run: Run, stage: str) -> str:
    """The table at the end of a stage."""
    shown = {"vector": ("gate/", "vector_on/", "vector_off/"), "finetune": ("suppression", "drift"), "infer": ("",)}[
        stage
    ]
    metrics = {n: m for n, m in run.folder.record["metrics"].items() if n.startswith(shown)}
    return metrics_table(f"{stage}: {run.folder.path}", metrics)
