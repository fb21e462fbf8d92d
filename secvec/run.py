"""A run from its config to its record: `train` for the three stages, `evaluate` for any saved backbone."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from secvec import stages
from secvec.base import base_for
from secvec.config import AnyConfig, EvaluateConfig, RunConfig
from secvec.console import metrics_table
from secvec.evaluation import Probe, evaluate_model
from secvec.fit import check_trainer, device_of
from secvec.leak import leak_probes
from secvec.plan import plan
from secvec.record import RunFolder, main_process

log = logging.getLogger(__name__)

STAGES = {"vector": stages.vector, "finetune": stages.finetune, "infer": stages.infer}


def train(config: RunConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Runs the stages of `config` in its run folder and returns the record.

    A stage that ended well there before is not run again (`force=true` runs it again). Raises SecVecError for what the
    user can mend; the record then says `failed` and why.
    """
    if config.plan:
        return _plan(config)
    check_trainer(config.trainer)
    folder = _open(config, overrides)
    if folder.finished(config.stages) and not config.force:
        log.info("already finished: %s (force=true runs it again)", folder.path)
        return folder.record
    with folder.running(), _experiment(config, folder):
        if config.force and main_process():  # other ranks start after this and read the record that it leaves
            folder.forget(config.stages)
        run = stages.Run(config, folder, base_for(config))
        for stage in config.stages:
            if stage in folder.record["stages"]:
                continue
            began = time.monotonic()
            STAGES[stage](run)
            if dist.is_initialized():
                dist.barrier()  # the next stage reads what rank 0 has just written
            folder.record["wall_seconds"][stage] = round(time.monotonic() - began, 3)
            folder.record["stages"].append(stage)
            folder.save()
            log.info("%s", stages.summary(run, stage))
    log.info("record: %s", folder.path / "record.json")
    return folder.record


def evaluate(config: EvaluateConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Questions the backbone that `config.model` names and returns the record; metrics are prefixed `after/`."""
    check_trainer(config.trainer)
    folder = _open(config, overrides)
    with folder.running():
        base = base_for(config)
        began = time.monotonic()
        model = base.load().to(device_of(config.trainer))
        if config.metrics == "lm_eval":
            from secvec.harness import lm_eval_metrics  # an optional package, and slow to import

            probe = Probe(lm_eval_metrics(model, base.tokenizer, config), [])
        else:
            tests, how = stages.test_sets(config), (config.behavior, config.judge, config.evaluation, "after")
            probe = evaluate_model(model, base.tokenizer, tests, *how)
            probe += leak_probes(model, base.tokenizer, tests["undesired"], *how)
        folder.record["metrics"] |= probe.metrics
        folder.add_predictions(probe.predictions)
        folder.record["wall_seconds"]["evaluate"] = round(time.monotonic() - began, 3)
        folder.record["backbone"] = {"folder": str(base.folder), "fingerprint": base.fingerprint}
    log.info("%s", metrics_table(f"{base.folder}", probe.metrics))
    log.info("record: %s", folder.path / "record.json")
    return folder.record


def _plan(config: RunConfig) -> dict[str, Any]:
    """Prints it instead of running; the folder that was made for the run goes."""
    log.info("%s", plan(config))
    for folder in (Path(config.run_dir), Path(config.run_dir).parent):
        with suppress(OSError):
            folder.rmdir()  # only if empty
    return {}


def _open(config: AnyConfig, overrides: Sequence[str]) -> RunFolder:
    identity = {
        "stage": getattr(config, "stage", "evaluate"),
        "defense": config.defense.name if isinstance(config, RunConfig) else "unknown",
        "behavior": config.behavior.name,
        "model": config.model.name,
        "tune": config.tune.kind if isinstance(config, RunConfig) else "unknown",
        "seed": config.seed,
        "overrides": list(overrides),
        "content": config.content,
        "config": config.model_dump(mode="json", exclude={"content"}),
    }
    _quiet()
    if not main_process():
        logging.getLogger("secvec").setLevel(logging.ERROR)
    return RunFolder(Path(config.run_dir), config.key(), identity)


def _quiet() -> None:
    """Leaves the screen to our own tables and bars; warnings stay."""
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)


class _experiment:
    """The W&B run of a secvec run: one, whatever stages it has; failed when it failed."""

    def __init__(self, config: RunConfig, folder: RunFolder):
        self.config, self.folder = config, folder
        self.on = config.logger.name == "wandb" and main_process()

    def __enter__(self) -> None:
        if not self.on:
            return
        import wandb

        config, settings = self.config, self.config.logger
        wandb.init(
            project=settings.project, entity=settings.entity, mode="offline" if settings.offline else "online",
            dir=self.folder.path, id=f"{self.folder.path.name}"[-64:], resume="allow", name=self.folder.path.name,
            group=config.sweep, job_type=config.stage, config=self.folder.record["config"],
            tags=[config.behavior.name, config.defense.name, str(config.model.name)],
        )  # fmt: skip

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if not self.on:
            return
        import wandb

        if wandb.run is not None:
            wandb.run.summary.update({name: metric["value"] for name, metric in self.folder.record["metrics"].items()})
        wandb.finish(exit_code=0 if kind is None else 1)
