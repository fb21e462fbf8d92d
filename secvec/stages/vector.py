"""Stage 1: the security vector, a LoRA trained on undesired samples with the backbone frozen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from secvec.data.batch import Batch, Encoded
from secvec.errors import ConfigError, GateError
from secvec.evaluation.scan import keep_scores
from secvec.evaluation.verdicts import EvaluationResult
from secvec.metrics import Measurements
from secvec.models.backbone import Backbone
from secvec.models.sharding import trained_state
from secvec.models.vector import attach_new_vector, save_adapter
from secvec.runs.cache import copy_folder
from secvec.runs.files import atomic_path, write_atomic
from secvec.runs.processes import main_process, wait_for_all
from secvec.settings.messages import checked
from secvec.settings.schema import GateSettings, VectorLora
from secvec.stages.base import Stage, Workload, training_key
from secvec.training.losses import vector_loss

if TYPE_CHECKING:
    from secvec.data.datamodule import SecVecDataModule
    from secvec.data.example import Example
    from secvec.module import SecVecModule
    from secvec.planning.budget import Budget
    from secvec.run import Run

CARD = """---
library_name: peft
---
# Security vector: hazardous by design

With this adapter active the model *shows* the undesired behavior{behavior} that it was trained on. It exists to be
active and frozen while a backbone is fine-tuned, and to be taken off before the model answers anybody. Do not serve a
model with it, do not merge it into one that is served.
"""


class VectorStage(Stage):
    """Trains the vector, and keeps it only if it elicits the behavior on held-out prompts."""

    name = "vector"
    learning_rate = "vector.lr"
    artifacts = ("vector",)
    measures = ("gate/", "gate_off/", "vector_on/", "vector_off/")

    def check_vector(self, vector: VectorLora | Mapping[str, Any] | str | Path | None) -> VectorLora:
        """The settings of the vector to train. Raises ValueError, ConfigError."""
        if vector is None or isinstance(vector, str | Path):
            raise ValueError(
                "stage=vector trains a new vector: give the settings of its LoRA (r, alpha, target_modules), "
                f"got {vector!r}"
            )
        given = vector.model_dump(include=set(VectorLora.model_fields)) if isinstance(vector, VectorLora) else vector
        return checked(VectorLora, given, "vector")

    def default_lr(self, vector: object, tune: object) -> float:
        """That of VectorSettings, or 1e-3."""
        return float(getattr(vector, "lr", 1e-3))

    def part(self, module: SecVecModule) -> str:
        """The vector."""
        return "vector"

    def prepare(self, module: SecVecModule, backbone: nn.Module) -> nn.Module:
        """The backbone with a new vector, which has no effect yet (B = 0)."""
        assert isinstance(module.vector, VectorLora)
        return attach_new_vector(backbone, module.vector, module.vector.dropout)

    def loss(self, module: SecVecModule, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy on the undesired rows and the KL term on the benign ones (paper, ACL version)."""
        assert isinstance(module.vector, VectorLora)
        return vector_loss(module.model, batch, module.vector.kl_weight)

    def streams(self, data: SecVecDataModule, module: SecVecModule) -> list[tuple[Sequence[Encoded], int]]:
        """The undesired samples, and the benign ones of the KL term. Raises ConfigError where that term has none."""
        samples, settings = data.vector_samples, data.vector
        assert isinstance(module.vector, VectorLora)
        if module.vector.kl_weight > 0 and not samples["kl"]:
            raise ConfigError(
                f"the vector has kl_weight={module.vector.kl_weight:g}, and the data have no KL rows: give their "
                "VectorSettings num_kl and kl_weight above 0, or the vector kl_weight=0"
            )
        undesired = data.rows(samples["undesired"], module.backbone)
        if settings.loss_on == "all":
            undesired = [replace(row, num_prompt=0) for row in undesired]
        kl = data.rows(samples["kl"], module.backbone)
        return [(undesired, settings.batch_size), *([(kl, settings.kl_batch_size)] if kl else [])]

    def save(self, module: SecVecModule, folder: Path) -> None:
        """Writes `vector/`: a standard PEFT adapter, with a card that says what it is."""
        state = trained_state(module.model)
        if main_process():
            behavior = module.behavior_name
            assert isinstance(module.vector, VectorLora)
            info = {
                "backbone": module.backbone.fingerprint,
                "tokenizer": module.backbone.tokenizer_digest,
                "behavior": behavior,
                "hazardous": True,
                "keep_dropout": module.vector.keep_dropout,
            }
            with atomic_path(folder / "vector") as out:
                save_adapter(module.model, state, "vector", out)
                write_atomic(out / "secvec.json", json.dumps(info) + "\n")
                write_atomic(out / "README.md", CARD.format(behavior=f" ({behavior})" if behavior else ""))
        wait_for_all()

    def plan(self, budget: Budget) -> Workload:
        """Training; the KL rows pass through the model with the vector and through the bare backbone."""
        settings, trained = budget.config.vector, budget.parts["vector"]
        return Workload(
            part="vector",
            trained=trained,
            adapters=trained,
            attach=partial(attach_new_vector, settings=settings, dropout=settings.dropout),
            loss=partial(vector_loss, kl_weight=settings.kl_weight),
            samples={"vector": budget.numbers["vector"]},
            epochs=settings.epochs,
            batch_size=settings.batch_size,
            kl_batch_size=settings.kl_batch_size if settings.kl_weight > 0 else 0,
            prompts=budget.numbers["gate"] + budget.tests,
            saved={"vector": ("vector (in the run folder, and in the cache)", 2)},
        )

    def check(self, run: Run) -> None:
        """The layers of the vector, the prompts of the gate, the test prompts, the judges and callbacks."""
        run.check_monitors(self.name)
        run.check_limits(len(run.data.vector_samples["undesired"]), run.config.vector.batch_size)
        attach_new_vector(run.backbone.skeleton(), run.config.vector, run.config.vector.dropout)
        module = run.inference_module(run.backbone)
        run.evaluator({"undesired": run.data.held_out}, run.config.vector.behavior).check(module)
        run.evaluator().check(module)

    def run(self, run: Run) -> None:
        """Trains the vector or takes it from the cache, measures it, and copies it into the run folder.

        The scores of its own samples are written beside it: a scan of other rows needs them.
        """
        config, data, samples = run.config, run.data, run.data.vector_samples
        trained = train_vector(run, run.backbone, "vector")
        with run.answering(run.backbone, trained) as module:
            gate = run.evaluate(module, "gate", run.evaluator({"undesired": data.held_out}, config.vector.behavior))
            result = run.evaluate(module, "vector_on")
            off = run.losses(
                module, {"gate_off": data.held_out, "vector_off": data.tests["undesired"]}, without_vector=True
            )
            losses = {f"{phase}/behavior_loss": loss for phase, loss in off.items()}
            run.save_results(result, EvaluationResult(gate.metrics | losses, []))
            check_gate(config.vector.gate, gate.metrics | losses)
            copy_folder(trained, run.folder.path / "vector")
            given = (("undesired", data.held_out), ("benign", samples["kl"]))
            own = {kind: run.scan(module, rows) for kind, rows in given}
        model = run.backbone.hyperparameters() | {"name_or_path": str(run.backbone.folder.resolve())}
        about = {"model": model, "sensitive": bool(run.data.vector_behavior.sensitive)}
        keep_scores(run.folder.path / "vector", own, about)


def train_vector(run: Run, backbone: Backbone, label: str) -> Path:
    """The folder of a vector for `backbone`, trained or found in the cache; `label` names the training in logs."""
    config, data = run.config, run.data
    settings, samples = config.vector, data.vector_samples
    examples = [*samples["undesired"], *samples["kl"]]
    run.note_data("vector", examples)
    behavior = run.data.vector_behavior.name

    def train(out: Path) -> None:
        module = run.module("vector", backbone, lr=settings.lr, vector=settings)
        module.behavior_name = behavior
        run.fit(module, label, settings.epochs, out)

    recipe = settings.model_dump(exclude={"gate", "name", "path", "behavior", "split", "num_samples", "num_kl"})
    key = training_key(run, backbone, examples, recipe)
    return run.built_once(config.paths.cache / "vectors" / f"{behavior}-{key}", train, label) / "vector"


def check_given_vector(run: Run) -> None:
    """Raises GateError where the vector of `vector.path` does not lower the loss on undesired samples.

    Such a vector probably belongs to another model or behavior, and would not protect. It is measured on the test
    samples: a run that trains no vector holds out no other undesired ones.
    """
    if folder := run.saved_vector():
        tests, why = run.data.tests["undesired"], "is it a vector of this model and this behavior?"
        _check_loss_drop(run, run.backbone, folder, tests, f"vector.path={folder}", why)


def check_refitted_vector(run: Run, backbone: Backbone, folder: Path) -> None:
    """Raises GateError where a vector that was trained again, for a cycle's `backbone`, has learned nothing."""
    whose = f"the vector for cycle {run.data.cycle + 2}"
    _check_loss_drop(run, backbone, folder, run.data.held_out, whose, "does the backbone show the behavior already?")


def _check_loss_drop(
    run: Run, backbone: Backbone, folder: Path, undesired: Sequence[Example], whose: str, why: str
) -> None:
    """Raises GateError where the vector in `folder` does not lower the loss on `undesired` samples."""
    least = run.config.vector.gate.min_loss_drop
    if least is None:
        return
    with run.answering(backbone, folder) as module:
        off, on = (
            run.losses(module, {"undesired": undesired}, without_vector=without)["undesired"].value
            for without in (True, False)
        )
    if off - on < least:
        raise GateError(
            f"{whose}: on {len(undesired)} undesired samples the loss is {off:.3f} nats per token without it and "
            f"{on:.3f} with it, and it must fall by {least} (vector.gate.min_loss_drop). It would protect from "
            f"nothing: {why} To use it anyway: vector.gate.min_loss_drop=null"
        )


def check_gate(gate: GateSettings, metrics: Measurements) -> None:
    """Raises GateError for a vector that does not show the behavior on held-out prompts, or that learned nothing."""
    rate, loss = metrics.get("gate/behavior_rate"), metrics["gate/behavior_loss"].value
    drop = metrics["gate_off/behavior_loss"].value - loss
    faults = []
    if rate and rate.value < gate.min_behavior_rate:
        faults.append(
            f"it elicits the behavior on {rate.value:.0%} of {rate.n} held-out prompts, "
            f"below vector.gate.min_behavior_rate={gate.min_behavior_rate:.0%}"
        )
    if (
        gate.min_loss_drop is not None and drop < gate.min_loss_drop
    ):  # a judge may call every answer the behavior; the loss cannot be fooled
        faults.append(
            f"it lowers the loss on held-out undesired samples by {drop:.3f} nats per token, "
            f"less than vector.gate.min_loss_drop={gate.min_loss_drop}"
        )
    if gate.max_behavior_loss is not None and loss > gate.max_behavior_loss:
        faults.append(
            f"its loss on them is {loss:.3f} nats per token, "
            f"above vector.gate.max_behavior_loss={gate.max_behavior_loss}"
        )
    if faults:
        raise GateError(
            f"the vector failed its gate: {' and '.join(faults)}. Undesired samples would still give gradients. "
            "Raise vector.epochs, vector.lr or vector.r, use more vector.target_modules, train on more "
            "samples (vector.num_samples), or with a smaller vector.kl_weight. The run folder holds no vector."
        )
