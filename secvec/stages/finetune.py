"""Stage 2: the backbone, or a task LoRA, on mixed data, with what the defense keeps active."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from secvec.data.batch import Batch, Encoded
from secvec.data.draw import data_hash
from secvec.evaluation.during_training import BehaviorDuringTraining
from secvec.models.backbone import Backbone, fingerprint, save_backbone
from secvec.models.sharding import full_state
from secvec.models.vector import attach_task, backbone_state, merge_task, save_adapter
from secvec.runs.cache import built_once, copy_folder, main_process, wait_for_all
from secvec.runs.files import atomic_path
from secvec.runs.keys import content_key
from secvec.stages.base import Stage, Workload
from secvec.stages.vector import saved_vector, train_vector
from secvec.training.telemetry import Telemetry

if TYPE_CHECKING:
    from secvec.data.datamodule import SecVecDataModule
    from secvec.module import SecVecModule
    from secvec.planning.budget import Budget
    from secvec.run import Run

REFITTED = "vector-refitted"
"""The last cycle's vector, where each cycle trains its own."""


class FinetuneStage(Stage):
    """Trains the backbone (or a task LoRA) on the mixture. The defense decides what is active, and the loss."""

    name = "finetune"
    learning_rate = "optimizer.lr"
    artifacts = ("backbone", "task", REFITTED)
    shown = ("suppression", "drift")

    def part(self, module: SecVecModule) -> str:
        """The backbone, or the task LoRA."""
        return "task" if module.tune else "backbone"

    def prepare(self, module: SecVecModule) -> nn.Module:
        """The backbone with what the defense attaches, frozen, and the task LoRA if there is one."""
        assert module.vector is None or isinstance(module.vector, Path)
        model = module.defense.attach(module.backbone.load(), module.vector)
        return attach_task(model, module.tune) if module.tune else model

    def loss(self, module: SecVecModule, batch: Batch) -> dict[str, Tensor]:
        """The loss of the defense."""
        return module.defense.loss(module.model, batch)

    def streams(self, data: SecVecDataModule, module: SecVecModule) -> list[tuple[Sequence[Encoded], int]]:
        """The mixture of the present cycle, its undesired samples labelled if the settings say so."""
        mixture = data.mixtures[data.cycle]
        undesired, benign = (data.rows(mixture[kind], module.backbone) for kind in ("undesired", "benign"))
        labelled = data.data.labelled
        if module.defense.needs_labels if labelled is None else labelled:
            undesired = [replace(row, undesired=True) for row in undesired]
        return [([*undesired, *benign], data.finetune.batch_size)]

    def save(self, module: SecVecModule, folder: Path) -> None:
        """Writes `backbone/`, a plain Hugging Face folder, and under tune=lora `task/`, which is merged into it."""
        state, backbone = full_state(module.model), module.backbone
        if main_process():
            weights = backbone_state(state)
            if module.tune:
                with atomic_path(folder / "task") as out:
                    save_adapter(module.model, state, "task", out)
                weights = merge_task(backbone.load(), folder / "task").state_dict()
            with atomic_path(folder / "backbone") as out:
                save_backbone(weights, backbone.folder, backbone.settings, out)
        wait_for_all()

    def plan(self, budget: Budget) -> Workload:
        """Training on the mixture, and the probes of the telemetry."""
        config, settings = budget.config, budget.config.finetune
        return Workload(
            trained=budget.parts.get("task") or budget.parts["backbone"],
            adapters=budget.adapters,
            samples=budget.mixture,
            epochs=settings.epochs * settings.cycles,
            batch_size=settings.batch_size,
            probe_every=config.telemetry.every_n_steps,
            saved={"task": ("task", 1), "backbone": ("backbone", 1)},
        )

    def run(self, run: Run) -> None:
        """Fine-tunes for the cycles that the settings name, and saves what the last one gives.

        With several cycles each starts from the backbone of the one before, on samples that no other cycle has. All but
        the last are kept in the cache: a run of eight cycles goes on where a run of four ended.
        """
        config, data, backbone, vector = run.config, run.data, run.backbone, saved_vector(run)
        trained = [example for mixture in data.mixtures for examples in mixture.values() for example in examples]
        run.note_data("finetune", trained)
        run.note_data("test", [example for examples in data.tests.values() for example in examples])
        for data.cycle in range(config.finetune.cycles - 1):
            backbone = _cycle(run, backbone, vector)
            if config.refits:
                vector = train_vector(run, backbone, f"vector-{data.cycle + 2}")
        if config.refits and vector is not None:
            copy_folder(vector, run.folder.path / REFITTED)
        data.cycle = config.finetune.cycles - 1
        telemetry, during = _telemetry(run), _behavior(run)
        module = run.module("finetune", backbone, lr=config.optimizer.lr, vector=vector)
        run.fit(module, "finetune", config.finetune.epochs, [*telemetry, *during])
        run.folder.record.ledger = {row.part: [row.parameters, row.trainable, row.active] for row in module.ledger()}
        module.save(run.folder.path)
        for callback in telemetry:
            run.folder.record.metrics |= callback.metrics()
        run.folder.record.wall_seconds["during"] = round(sum(callback.seconds for callback in during), 3)


def _cycle(run: Run, backbone: Backbone, vector: Path | None) -> Backbone:
    """The backbone after a cycle that is not the last, trained or found in the cache."""
    config, data = run.config, run.data

    def train(out: Path) -> None:
        module = run.module("finetune", backbone, lr=config.optimizer.lr, vector=vector)
        run.fit(module, f"finetune-{data.cycle + 1}", config.finetune.epochs)
        module.save(out)

    mixture = data.mixtures[data.cycle]
    shaping = {"defense", "tune", "optimizer", "scheduler", "trainer", "num_threads", "callbacks", "seed"}
    settings = config.model_dump(mode="json", include=shaping)
    sources = [*backbone.identity, vector and fingerprint(vector), config.labelled, settings]
    shape = [config.finetune.epochs, config.finetune.batch_size, data_hash(mixture["undesired"] + mixture["benign"])]
    folder = built_once(config.paths.cache / "cycles" / content_key([*sources, *shape]), train)
    return backbone.at(folder / "backbone")


def _telemetry(run: Run) -> list[Telemetry]:
    settings, data = run.config.telemetry, run.data
    if not settings.every_n_steps:
        return []
    n = settings.num_samples
    rows = {
        kind: data.rows(examples[:: max(1, len(examples) // n)][:n], run.backbone)  # of every stream
        for kind, examples in data.mixtures[data.cycle].items()
    }
    return [Telemetry(rows, settings.every_n_steps)]


def _behavior(run: Run) -> list[BehaviorDuringTraining]:
    config, settings = run.config, run.config.evaluation.validation
    prompts = run.data.validation(settings.num_prompts) if settings.every_n_steps else {}
    if "undesired" not in prompts:
        return []
    limit = config.evaluation.max_new_tokens
    return [BehaviorDuringTraining(prompts, config.behavior, config.judge, settings.every_n_steps, limit)]
