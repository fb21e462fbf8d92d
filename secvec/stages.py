"""The stages of the method (Zhou et al., arXiv 2311.02105), each from the artifacts of the one before.

align (first use of a base that must learn to refuse) -> vector -> finetune -> infer.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import nn

from secvec.base import Base, asked_once, source_of
from secvec.behaviors.base import Behavior
from secvec.config import AnyConfig, RunConfig
from secvec.console import metrics_table
from secvec.data.datamodule import SecVecDataModule
from secvec.data.encode import Encoded
from secvec.data.example import Example
from secvec.data.mixture import check_disjoint, data_hash, draw_benign
from secvec.data.tokens import encoded
from secvec.errors import ArtifactError, GateError
from secvec.evaluation import Metrics, Probe, deactivation_gap, evaluate_model, kl_to_base, mean_loss, perplexity
from secvec.files import atomic_path, write_atomic
from secvec.fit import device_of, fit
from secvec.generation import Source
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
from secvec.naming import content_key
from secvec.record import RunFolder, cached, main_process
from secvec.settings import EvaluationSettings
from secvec.telemetry import Telemetry

log = logging.getLogger(__name__)

HAZARD = """---
library_name: peft
---
# Security vector: hazardous by design

With this adapter active the model *shows* the undesired behavior ({behavior}) that it was trained on. It exists to be
active and frozen while a backbone is fine-tuned, and to be taken off before the model answers anybody. Do not serve a
model with it, do not merge it into one that is served.
"""


@dataclass(frozen=True)
class Run:
    """What every stage needs."""

    config: RunConfig
    folder: RunFolder
    base: Base

    @cached_property
    def tests(self) -> dict[str, list[Example]]:
        """Held-out examples by kind; the same for every stage and defense of a seed."""
        return test_sets(self.config)

    def rows(self, examples: Sequence[Example]) -> list[Encoded]:
        """Tokens of `examples`."""
        return encoded(examples, self.base.tokenizer, self.base.context, self.config.paths.cache)

    def ask(
        self, model: nn.Module, phase: str, source: Source, tests: Mapping[str, Sequence[Example]] | None = None
    ) -> Probe:
        """Answers and metrics of `model` in the state `phase`; `source` writes what it answers."""
        tests = self.tests if tests is None else tests
        with self._asking():
            return evaluate_model(self.placed(model), self.base.tokenizer, tests, *self._how, phase, source)

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


def vector(run: Run) -> None:
    """Trains the vector on a frozen backbone, and saves it only if it elicits the behavior on held-out prompts."""
    config, base, settings, data = run.config, run.base, run.config.vector, run.config.data
    examples = config.behavior.examples("vector", settings.num_samples, config.seed)
    with_kl = settings.kl_weight > 0
    kl = draw_benign(data.benign, "vector", settings.num_kl, config.seed, data.weights) if with_kl else []
    held_out = config.behavior.examples("validation", settings.gate.num_prompts, config.seed)
    check_disjoint([*examples, *kl, *held_out], [e for tests in run.tests.values() for e in tests])
    run.note_data("vector", [*examples, *kl])

    def train(out: Path) -> None:
        rows = SecVecDataModule(
            run.rows(examples), settings.batch_size, config.seed, base.tokenizer.pad_token_id,
            run.rows(kl), settings.kl_batch_size if with_kl else 0,
        )  # fmt: skip
        module = fit(
            folder=run.folder.path, stage="vector", seed=config.seed,
            build=lambda: attach_new_vector(base.load(), settings, settings.dropout),
            loss=partial(vector_loss, kl_weight=settings.kl_weight), part="vector", lr=settings.lr,
            epochs=settings.epochs, data=rows, optimizer=config.optimizer, scheduler=config.scheduler,
            trainer=config.trainer, logger=config.logger, callbacks=[],
        )  # fmt: skip
        state = module.full_state()
        if main_process():
            save_adapter(module.model, state, "vector", out)
            meta = {"backbone": base.fingerprint, "behavior": config.behavior.name, "hazardous": True}
            write_atomic(out / "secvec.json", json.dumps(meta) + "\n")
            write_atomic(out / "README.md", HAZARD.format(behavior=config.behavior.name))
        module.trainer.strategy.barrier()

    optimizer = config.optimizer.model_dump(exclude={"lr"})
    sources = [base.fingerprint, settings.model_dump(exclude={"gate"}), data_hash([*examples, *kl]), config.seed]
    key = content_key([*sources, optimizer, config.scheduler.model_dump(), config.trainer.model_dump(mode="json")])
    trained = _trained_once(config.paths.cache / "vectors" / f"{config.behavior.name}-{key}", train)

    model = attach_frozen_vector(base.load(), trained)
    source = source_of(config, base, trained)
    gate = run.ask(model, "gate", source, {"undesired": held_out})
    probe = run.ask(model, "vector_on", source)
    with vector_off(model):
        off = mean_loss(model, base.tokenizer, run.tests["undesired"], config.evaluation)
    run.keep(probe, Probe(gate.metrics | {"vector_off/behavior_loss": off}, []))
    _check_gate(config, gate)
    if main_process():
        with atomic_path(run.folder.path / "vector") as out:
            shutil.copytree(trained, out)


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
    """Fine-tunes the backbone (or a task LoRA) on the mixture, with what the defense keeps active."""
    config, base = run.config, run.base
    adapter = _vector_for(run)
    harmful, benign = config.data.counts
    undesired = config.behavior.examples("finetune", harmful, config.seed)
    others = draw_benign(config.data.benign, "finetune", benign, config.seed, config.data.weights)
    check_disjoint([*undesired, *others], [e for tests in run.tests.values() for e in tests])
    run.note_data("finetune", [*undesired, *others])
    run.note_data("test", [e for tests in run.tests.values() for e in tests])

    def build() -> nn.Module:
        model = config.defense.attach(base.load(), adapter)
        return attach_task(model, config.tune.lora) if config.tune.lora else model

    rows, pad = {"undesired": run.rows(undesired), "benign": run.rows(others)}, base.tokenizer.pad_token_id
    if config.data.labelled:
        rows["undesired"] = [replace(row, undesired=True) for row in rows["undesired"]]
    telemetry = None
    if config.telemetry.every_n_steps:
        n = config.telemetry.num_samples
        probes = {kind: some[:: max(1, len(some) // n)][:n] for kind, some in rows.items()}  # of every stream
        telemetry = Telemetry(probes, config.telemetry.every_n_steps, pad)
    module = fit(
        folder=run.folder.path, stage="finetune", seed=config.seed, build=build, loss=config.defense.loss,
        part="task" if config.tune.lora else "backbone", lr=config.optimizer.lr, epochs=config.finetune.epochs,
        data=SecVecDataModule([*rows["undesired"], *rows["benign"]], config.finetune.batch_size, config.seed, pad),
        optimizer=config.optimizer, scheduler=config.scheduler, trainer=config.trainer, logger=config.logger,
        callbacks=[telemetry] if telemetry else [],
    )  # fmt: skip
    run.folder.record["ledger"] = {row.part: [row.parameters, row.trainable, row.active] for row in module.ledger()}
    state = module.full_state()
    if main_process():
        _save_finetuned(run, module.model, state)
    module.trainer.strategy.barrier()
    if telemetry:
        single = {"drift": "drift", "undesired/suppression_ratio": "suppression_ratio"}
        values = {new: telemetry.last[old] for old, new in single.items() if old in telemetry.last}
        run.folder.record["metrics"] |= {
            k: {"value": v, "ci_low": None, "ci_high": None, "n": 1} for k, v in values.items()
        }


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


def _save_finetuned(run: Run, model: Any, state: Mapping[str, Any]) -> None:
    folder, base = run.folder.path, run.base
    if run.config.tune.lora is None:
        with atomic_path(folder / "backbone") as out:
            save_backbone(backbone_state(state), base.folder, base.settings, out)
        return
    with atomic_path(folder / "task") as out:
        save_adapter(model, state, "task", out)
    with atomic_path(folder / "backbone") as out:
        merged = merge_task(base.load(), folder / "task")
        save_backbone(merged.state_dict(), base.folder, base.settings, out)


def infer(run: Run) -> None:
    """Questions the base, the fine-tuned backbone with the vector (`active`) and without it (`after`)."""
    backbone = run.folder.path / "backbone"
    if not backbone.is_dir():
        raise ArtifactError(f"no fine-tuned backbone in {backbone}: run stage=finetune with the same settings first")
    tuned = Base(check(backbone), fingerprint(backbone), run.base.settings)
    base, source = source_of(run.config, run.base), source_of(run.config, tuned)
    run.keep(asked_once(run.config, run.base, run.tests, lambda: run.ask_all(run.base.load(), "base", base)))
    model = tuned.load()
    after = run.ask(model, "after", source)
    run.keep(Probe(_distance_from_base(run, model, after), []), run.leaks(model, "after", source))
    del model  # room for the next
    adapter = _vector_for(run)
    if adapter is None:
        active = Probe(
            {name.replace("after/", "active/"): value for name, value in after.metrics.items()},
            [row | {"phase": "active"} for row in after.predictions],
        )
    else:
        with_vector = source_of(run.config, tuned, adapter)
        active = run.ask(attach_frozen_vector(tuned.load(), adapter), "active", with_vector)
    run.keep(active, after, Probe(deactivation_gap(active.predictions, after.predictions), []))


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
