"""Stage 2: the backbone, or a task LoRA, on mixed data, with what the defense keeps active."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from secvec.config.load import RunConfig
from secvec.data.datamodule import SecVecDataModule
from secvec.data.draw import check_disjoint, data_hash, draw_benign_lots
from secvec.data.example import Example
from secvec.models.backbone import check, fingerprint, save_backbone
from secvec.models.vector import attach_task, backbone_state, merge_task, save_adapter
from secvec.module import SecVecModule
from secvec.runs.cache import main_process
from secvec.runs.files import atomic_path
from secvec.runs.keys import content_key
from secvec.runs.record import REFITTED
from secvec.stages.align import Base
from secvec.stages.base import Run, copy_folder, trained_once
from secvec.stages.vector import trained_vector, vector_for
from secvec.training.telemetry import Telemetry
from secvec.training.trainer import fit


def finetune(run: Run) -> None:
    """Fine-tunes the backbone (or a task LoRA) on the mixture, with what the defense keeps active.

    With several cycles each starts from the backbone of the one before, on samples that no other cycle has. All but the
    last are kept in the cache: a run of eight cycles goes on where a run of four ended.
    """
    config, base, adapter = run.config, run.base, vector_for(run)
    *before, last = cycles = mixtures(config)
    every = [example for samples in cycles for kind in samples.values() for example in kind]
    tests = [example for some in run.tests.values() for example in some]
    check_disjoint(every, tests)
    run.note_data("finetune", every)
    run.note_data("test", tests)
    for number, samples in enumerate(before, 1):
        base = _cycle(run, base, adapter, samples, f"finetune-{number}")
        if config.finetune.refits:
            adapter = trained_vector(run, base, f"vector-{number + 1}")
    if config.finetune.refits:
        assert adapter is not None
        copy_folder(adapter, run.folder.path / REFITTED)
    telemetry = _telemetry(run, last)
    module = _fit_mixture(run, base, adapter, last, "finetune", telemetry)
    run.folder.record["ledger"] = {row.part: [row.parameters, row.trainable, row.active] for row in module.ledger()}
    _save_finetuned(run, base, module, run.folder.path)
    if telemetry:
        single = {"drift": "drift", "undesired/suppression_ratio": "suppression_ratio"}
        values = {new: telemetry.last[old] for old, new in single.items() if old in telemetry.last}
        run.folder.record["metrics"] |= {
            k: {"value": v, "ci_low": None, "ci_high": None, "n": 1} for k, v in values.items()
        }


def mixtures(config: RunConfig) -> list[dict[str, list[Example]]]:
    """The samples of each cycle, by kind; those of a cycle do not depend on how many follow."""
    data, n = config.data, config.finetune.cycles
    harmful, benign = data.counts
    undesired = config.behavior.examples("finetune", harmful * n, config.seed)
    others = draw_benign_lots(data.benign, "finetune", benign, config.seed, data.weights, n)
    return [{"undesired": undesired[harmful * i : harmful * (i + 1)], "benign": lot} for i, lot in enumerate(others)]


def _cycle(run: Run, base: Base, adapter: Path | None, samples: dict[str, list[Example]], stage: str) -> Base:
    """The backbone after a cycle that is not the last, trained or found in the cache."""
    config = run.config

    def train(out: Path) -> None:
        _save_finetuned(run, base, _fit_mixture(run, base, adapter, samples, stage, None), out)

    settings = config.model_dump(mode="json", include={"defense", "tune", "optimizer", "scheduler", "trainer", "seed"})
    sources = [*base.identity, adapter and fingerprint(adapter), config.data.labelled, settings]
    shape = [config.finetune.epochs, config.finetune.batch_size, data_hash(samples["undesired"] + samples["benign"])]
    folder = trained_once(config.paths.cache / "cycles" / content_key([*sources, *shape]), train) / "backbone"
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
