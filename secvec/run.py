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

from secvec.config.load import AnyConfig, EvaluateConfig, RunConfig
from secvec.evaluation.evaluator import Probe, evaluate_model
from secvec.evaluation.leak_probes import leak_probes
from secvec.evaluation.vllm import how
from secvec.planning.table import plan
from secvec.runs.cache import main_process
from secvec.runs.console import metrics_table
from secvec.runs.record import RunFolder
from secvec.stages.align import base_for, source_of
from secvec.stages.base import Run, summary, test_sets
from secvec.stages.finetune import finetune
from secvec.stages.infer import infer
from secvec.stages.vector import vector
from secvec.tracking.base import Tracker
from secvec.tracking.session import Session, tracker_for
from secvec.training.trainer import check_trainer, device_of

log = logging.getLogger(__name__)

STAGES = {"vector": vector, "finetune": finetune, "infer": infer}


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
    tracker = tracker_for(folder.path, config.logger, config.force) if main_process() else Tracker()
    with Session(tracker, folder.path, folder.record, config.logger) as session, folder.running():
        session.open()
        if config.force and main_process():  # other ranks start after this and read the record that it leaves
            folder.forget(config.stages)
        run = Run(config, folder, base_for(config), tracker)
        folder.record["base"] = {"folder": str(run.base.folder), "fingerprint": run.base.fingerprint}
        for stage in config.stages:
            if stage in folder.record["stages"]:
                continue
            began = time.monotonic()
            with session.stage():
                STAGES[stage](run)
                if dist.is_initialized():
                    dist.barrier()  # the next stage reads what rank 0 has just written
                folder.record["wall_seconds"][stage] = round(time.monotonic() - began, 3)
                folder.record["stages"].append(stage)
                folder.save()
            log.info("%s", summary(run, stage))
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
            from secvec.evaluation.lm_eval import lm_eval_metrics  # an optional package, and slow to import

            probe = Probe(lm_eval_metrics(model, base.tokenizer, config), [])
        else:
            tests, asked = test_sets(config), (config.behavior, config.judge, config.evaluation, "after")
            source = source_of(config, base)
            probe = evaluate_model(model, base.tokenizer, tests, *asked, source)
            probe += leak_probes(model, base.tokenizer, tests["undesired"], *asked, source)
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
        "generation": how(config.generation, config.trainer),
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
