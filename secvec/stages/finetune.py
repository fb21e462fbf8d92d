"""Stage 2: the backbone, or a task LoRA, on mixed data, with what the defense keeps active."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from secvec.data.batch import Batch, Encoded
from secvec.data.draw import data_hash
from secvec.errors import ArtifactError, ConfigError
from secvec.evaluation.during_training import BehaviorDuringTraining
from secvec.evaluation.leak_probes import write_context
from secvec.metrics import Measurement
from secvec.models.backbone import Backbone, check_savable, save_backbone
from secvec.models.outline import Weights
from secvec.models.sharding import on_first, trained_state
from secvec.models.vector import (
    activate,
    attach_new_vector,
    attach_task,
    backbone_state,
    merged_task,
    save_adapter,
    vector_digest,
    with_task,
)
from secvec.runs.cache import copy_folder
from secvec.runs.content import by_content, folder_digest
from secvec.runs.files import atomic_path, write_atomic
from secvec.runs.keys import content_key
from secvec.runs.processes import from_first, main_process, wait_for_all
from secvec.settings.target import to_target
from secvec.stages.base import Stage, Workload, training_key
from secvec.stages.vector import check_given_vector, check_refitted_vector, train_vector
from secvec.training.telemetry import Telemetry

if TYPE_CHECKING:
    from secvec.data.datamodule import SecVecDataModule
    from secvec.defenses.base import Defense
    from secvec.module import SecVecModule
    from secvec.planning.budget import Budget
    from secvec.run import Run
    from secvec.settings.schema import LoraSettings, TuneSettings, VectorLora
    from secvec.settings.trainer import OptimizerSettings

log = logging.getLogger(__name__)

REFITTED = "vector-refitted"
"""The last cycle's vector, where each cycle trains its own."""
MOST_DURING = 0.03
"""Share of the stage's time that answers during the training may take without a word."""


class FinetuneStage(Stage):
    """Trains the backbone (or a task LoRA) on the mixture. The defense decides what is active, and the loss."""

    name = "finetune"
    learning_rate = "optimizer.lr"
    artifacts = ("backbone", "task", REFITTED)
    measures = ("suppression", "drift", "scan/")

    def default_lr(self, vector: object, tune: object) -> float:
        """2e-5, or 2e-4 for a task LoRA."""
        return 2e-5 if tune is None else 2e-4

    def part(self, module: SecVecModule) -> str:
        """The backbone, or the task LoRA."""
        return "task" if module.tune else "backbone"

    def prepare(self, module: SecVecModule, backbone: nn.Module) -> nn.Module:
        """The backbone with what the defense attaches, frozen, and the task LoRA if there is one."""
        assert module.vector is None or isinstance(module.vector, Path)
        model = module.defense.attach(backbone, module.vector)
        return attach_task(model, module.tune) if module.tune else model

    def loss(self, module: SecVecModule, batch: Batch) -> dict[str, Tensor]:
        """The loss of the defense."""
        return module.defense.loss(module.model, batch)

    def keeps_weights(self, module: SecVecModule) -> bool:
        """Where the defense compares with them."""
        return module.defense.keeps_weights

    def gradients(self, module: SecVecModule, batches: list[Batch]) -> dict[str, Tensor]:
        """What the defense does to them."""
        return module.defense.gradients(module.model, batches)

    def streams(self, data: SecVecDataModule, module: SecVecModule) -> list[tuple[Sequence[Encoded], int]]:
        """The mixture of the present cycle, its undesired samples labelled if the settings say so.

        Raises ConfigError where the defense lacks what a run makes for it.
        """
        if module.defense.needs_run and not data.prepared:
            raise ConfigError(
                f"defense={module.defense.name} needs a preparation before the training, and only train.py makes it: "
                f"python train.py defense={module.defense.name}"
            )
        if isinstance(module.vector, Path) and not data.prepared:  # a run has checked it, on the model it starts from
            module.backbone.check_vector(module.vector)
        mixture = data.mixtures[data.cycle]
        undesired, benign = (data.rows(mixture[kind], module.backbone) for kind in ("undesired", "benign"))
        labelled = data.data.labelled
        if module.defense.needs_labels if labelled is None else labelled:
            undesired = [replace(row, undesired=True) for row in undesired]
        streams: list[tuple[Sequence[Encoded], int]] = [([*undesired, *benign], data.finetune.batch_size)]
        if size := module.defense.extra_batch_size:
            if not data.extra:
                raise ConfigError(
                    f"defense={module.defense.name} needs {size} extra rows in each batch: set data.extra to the list "
                    "of Example that its extra_samples(run) returns"
                )
            streams.append((data.rows(data.extra, module.backbone), size))
        return streams

    def save(self, module: SecVecModule, folder: Path) -> None:
        """Writes `backbone/`, a plain Hugging Face folder, and under tune=lora `task/`, which is merged into it.

        The first process reads the weights part by part: the whole is in memory only where the defense changes it.
        """
        backbone, defense, vector = module.backbone, module.defense, module.vector
        assert vector is None or isinstance(vector, Path)

        def write(weights: Weights) -> None:
            if defense.finishes:
                weights = Weights.of(defense.finish(weights.whole(), backbone, vector))
            with atomic_path(folder / "backbone") as out:
                save_backbone(weights, backbone.folder, backbone.settings, out)

        if module.tune:
            state = trained_state(module.model)
            if main_process():
                with atomic_path(folder / "task") as out:
                    save_adapter(module.model, state, "task", out)
                rounded = backbone.settings.quantization  # then its folder has other weights than were trained on
                write(merged_task(module.model if rounded else with_task(backbone.outline(), folder / "task")))
        else:
            on_first(backbone_state(module.model.state_dict(keep_vars=True)), write)
        wait_for_all()

    def plan(self, budget: Budget) -> Workload:
        """Training on the mixture, and the probes of the telemetry."""
        config, settings = budget.config, budget.config.finetune
        idle = 0 if config.defense.vector_acts else budget.parts.get("vector", 0)
        return Workload(
            part="task" if "task" in budget.parts else "backbone",
            attach=partial(_attached, config.defense, config.vector, config.tune.lora),
            loss=config.defense.loss,
            gradients=config.defense.gradients,
            keeps_weights=config.defense.keeps_weights,
            step=config.defense.longest_step,
            trained=budget.parts.get("task") or budget.parts["backbone"],
            adapters=budget.adapters - idle,
            samples=budget.mixture,
            epochs=settings.epochs * settings.cycles,
            batch_size=settings.batch_size,
            kl_batch_size=config.defense.extra_batch_size,
            probe_every=config.telemetry.every_n_steps,
            saved={"task": ("task", 1), "backbone": ("backbone", 1)},
        )

    def check(self, run: Run) -> None:
        """The prompts asked during training, the task LoRA, a vector that exists already, saving, and disk space."""
        config, backbone, validation = run.config, run.backbone, run.config.evaluation.validation
        run.check_monitors(self.name)
        fewest = min(sum(map(len, mixture.values())) for mixture in run.data.mixtures)
        run.check_limits(fewest, config.finetune.batch_size)
        if validation.every_n_steps:
            run.evaluator(run.data.validation(validation.num_prompts)).check(run.inference_module(backbone))
        if config.vector.path or "vector" not in config.stages:
            run.saved_vector()
        if config.tune.lora:
            attach_task(backbone.skeleton(), config.tune.lora)
        config.defense.check(run)
        _warn_of_rounding(config.model.dtype, config.trainer.precision, config.optimizer, config.tune)
        check_savable(backbone)
        _check_disk(run)
        if config.vector.path:  # last, as it takes the longest: it loads the model
            check_given_vector(run)

    def run(self, run: Run) -> None:
        """Fine-tunes for the cycles that the settings name, and saves what the last one gives.

        With several cycles each starts from the backbone of the one before, on samples that no other cycle has. All but
        the last are kept in the cache: a run of eight cycles goes on where a run of four ended.
        """
        config = run.config = run.config.model_copy(update={"defense": run.config.defense.prepared(run)})
        data, backbone, vector = run.data, config.defense.starting(run), run.saved_vector()
        mixtures = [config.defense.training_samples(run, mixture) for mixture in data.mixtures]
        if mixtures != data.mixtures:
            data.mixtures = mixtures
            data.fit_to(backbone.tokenizer, backbone.context, ["finetune"])
        data.prepared = True
        trained = [example for mixture in data.mixtures for examples in mixture.values() for example in examples]
        run.note_data("finetune", trained)
        run.note_data("test", [example for examples in data.tests.values() for example in examples])
        if main_process():
            write_context(run.folder.path, data.mixtures[-1])
        data.extra = config.defense.extra_samples(run)
        if data.extra:
            run.note_data("extra", data.extra)
        for data.cycle in range(config.finetune.cycles - 1):
            backbone = _cycle(run, backbone, vector)
            if config.refits:
                vector = train_vector(run, backbone, f"vector-{data.cycle + 2}")
                check_refitted_vector(run, backbone, vector)
        if config.refits and vector is not None:
            copy_folder(vector, run.folder.path / REFITTED)
        data.cycle = config.finetune.cycles - 1
        _last_cycle(run, backbone, vector)


def _last_cycle(run: Run, backbone: Backbone, vector: Path | None) -> None:
    """Trains the last cycle in the run folder, or copies what another run of the same training left in its own.

    So a setting that only evaluation reads trains nothing again. The pointer in the cache says where that run is.
    """
    config, path, record = run.config, run.folder.path, run.folder.record
    watched = [config.telemetry, config.evaluation.validation]
    held_out = [data_hash(rows) for rows in run.data.validation(config.evaluation.validation.num_samples).values()]
    key = content_key([_key(run, backbone, vector), [one.model_dump() for one in watched], held_out])
    pointer = config.paths.cache / "finetuned" / f"{key}.json"
    found = None if config.force else from_first(lambda: _trained(pointer))
    if found is None:
        telemetry, during = _telemetry(run), _behavior(run)
        module, began = run.module("finetune", backbone, lr=config.optimizer.lr, vector=vector), time.monotonic()
        rows = run.fit(module, "finetune", config.finetune.epochs, path, [*telemetry, *during])
        answering, whole = sum(callback.seconds for callback in during), time.monotonic() - began
        record.wall_seconds["during"] = round(answering, 3)
        if whole > 60 and answering > MOST_DURING * whole:
            log.warning(
                "answers during the training took %.0f %% of its time: a larger evaluation.validation.every_n_steps "
                "(now %d), or fewer num_prompts there, make it less",
                *(100 * answering / whole, config.evaluation.validation.every_n_steps),
            )
        found = {
            "folder": str(path.resolve()),
            "backbone": from_first(lambda: folder_digest(path / "backbone")),
            "seconds": round(time.monotonic() - began, 3),
            "ledger": {row.part: [row.parameters, row.trainable, row.active] for row in rows},
            "metrics": {k: asdict(v) for callback in telemetry for k, v in callback.metrics().items()},
        }
        if main_process():
            write_atomic(pointer, json.dumps(found) + "\n")
    elif (source := Path(found["folder"])) != path.resolve():
        log.info("the same training is in %s: copied", source)
        for name in ("task", "backbone"):
            if (source / name).is_dir():
                copy_folder(source / name, path / name)
        run.copy_curves(source, "finetune")
    run.folder.drop_checkpoints("finetune")
    record.ledger = found["ledger"]
    if "seconds" in found:
        record.wall_seconds["training"] = found["seconds"]
    record.metrics |= {name: Measurement(**one) for name, one in found["metrics"].items()}
    wait_for_all()


def _check_disk(run: Run) -> None:
    """Raises ArtifactError where the backbone, the checkpoints before it and those of earlier cycles do not fit."""
    config, size = run.config, run.backbone.num_bytes
    copies = 1 + (2 if "adam" in config.optimizer.target.lower() else 0) + config.defense.keeps_weights
    checkpoints = size + (2 * copies * size if config.tune.kind == "full" else 0)
    wanted = {run.folder.path: (checkpoints, "the fine-tuned backbone and two checkpoints", "paths.outputs")}
    if cycles := config.finetune.cycles - 1:
        kept = config.paths.cache / "cycles"
        kept.mkdir(parents=True, exist_ok=True)
        wanted[kept] = (cycles * size, f"the backbones of {cycles} earlier cycles", "paths.cache")
    for path, (needed, what, setting) in wanted.items():
        there = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        free = shutil.disk_usage(path).free
        if needed - there > free:
            raise ArtifactError(
                f"{path}: {what} take up to {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: free "
                f"{(needed - there - free) / 1e9:.1f} GB, or set {setting} to another disk (tune=lora has small "
                "checkpoints)"
            )


def _trained(pointer: Path) -> dict[str, Any] | None:
    """What the pointer says of a training whose backbone is still there as it was; None: there is none."""
    try:
        found: dict[str, Any] = json.loads(pointer.read_text(encoding="utf-8"))
        return found if folder_digest(Path(found["folder"]) / "backbone") == found["backbone"] else None
    except (OSError, ValueError):
        return None


def _warn_of_rounding(dtype: str, precision: str, optimizer: OptimizerSettings, tune: TuneSettings) -> None:
    half = dtype != "float32" or precision == "bf16-true"
    if tune.kind == "full" and half and optimizer.target.startswith("torch.optim."):  # others may round at random
        log.warning(
            "the backbone is trained in half precision: a step that is smaller than 1/256 of a weight is lost, so at "
            "lr=%g most of the data is not learned, nor the behavior, with any defense or none. Take model.dtype="
            "float32 with trainer.precision=bf16-mixed, or tune=lora", optimizer.lr,
        )  # fmt: skip


def _attached(defense: Defense, vector: VectorLora, task: LoraSettings | None, model: nn.Module) -> nn.Module:
    """`model` as `prepare` makes it, with a new vector in place of the trained one."""
    if defense.uses_vector and defense.vector_acts:
        dropout = vector.dropout if vector.keep_dropout else 0.0
        model = activate(attach_new_vector(model, vector, dropout), defense.activation)
    return attach_task(model, task) if task else model


def _cycle(run: Run, backbone: Backbone, vector: Path | None) -> Backbone:
    """The backbone after a cycle that is not the last, trained or found in the cache."""

    label = f"finetune-{run.data.cycle + 1}"

    def train(out: Path) -> None:
        module = run.module("finetune", backbone, lr=run.config.optimizer.lr, vector=vector)
        run.fit(module, label, run.config.finetune.epochs, out)

    folder = run.built_once(run.config.paths.cache / "cycles" / _key(run, backbone, vector), train, label)
    return backbone.at(folder / "backbone")


def _key(run: Run, backbone: Backbone, vector: Path | None) -> str:
    """The key of the training of the present cycle."""
    config, mixture = run.config, run.data.mixtures[run.data.cycle]
    recipe = [by_content(to_target(config.defense)), config.tune.model_dump(), config.labelled, config.optimizer.lr]
    recipe += [vector and vector_digest(vector), config.finetune.epochs, config.finetune.batch_size]
    return training_key(run, backbone, mixture["undesired"] + mixture["benign"] + run.data.extra, recipe)


def _telemetry(run: Run) -> list[Telemetry]:
    settings, data = run.config.telemetry, run.data
    if not settings.every_n_steps:
        return []
    n = settings.num_samples
    probes = {
        kind: data.rows(examples[:: max(1, len(examples) // n)][:n], run.backbone)  # of every stream
        for kind, examples in (data.mixtures[data.cycle] | {"extra": data.extra}).items()
    }
    extra = probes.pop("extra")
    at_once = max(1, run.config.finetune.batch_size // run.processes)  # as a training step
    return [Telemetry(probes, settings.every_n_steps, extra, at_once)]


def _behavior(run: Run) -> list[BehaviorDuringTraining]:
    config, settings = run.config, run.config.evaluation.validation
    prompts = run.data.validation(settings.num_prompts) if settings.every_n_steps else {}
    if "undesired" not in prompts:
        return []
    limit = config.evaluation.max_new_tokens
    return [BehaviorDuringTraining(prompts, config.behavior, config.judge, settings.every_n_steps, limit)]
