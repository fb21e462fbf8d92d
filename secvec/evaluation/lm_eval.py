"""Utility by lm-evaluation-harness: `evaluate.py metrics=lm_eval tasks=[...]`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from secvec.errors import ArtifactError, ConfigError, nearest
from secvec.metrics import Measurement, Measurements

if TYPE_CHECKING:
    from secvec.config.schema import EvaluateConfig


def lm_eval_metrics(model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: EvaluateConfig) -> Measurements:
    """Every numeric result of `config.tasks` as `lm_eval/TASK/METRIC`, with a 95 % interval from its standard error.

    Raises ConfigError for an unknown task, ArtifactError for one whose data cannot be had.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("metrics=lm_eval needs lm-evaluation-harness: pip install 'secvec[lm-eval]'") from None

    folder = config.task_folder
    manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=folder is None)
    if unknown := [task for task in config.tasks if task not in manager.all_tasks]:
        where = "lm-evaluation-harness" if folder is None else str(folder)
        known = manager.all_tasks
        raise ConfigError(
            "\n".join(f"tasks: {where} has no task {task!r}{nearest(task, known)}" for task in unknown)
            + ("" if folder is None else f"\n  known there: {', '.join(sorted(known))}")
        )
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.evaluation.batch_size)  # type: ignore[arg-type]
    try:
        found = simple_evaluate(
            lm,
            tasks=list(config.tasks),
            task_manager=manager,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            apply_chat_template=config.chat_template and tokenizer.chat_template is not None,
            log_samples=False,
            bootstrap_iters=1000,
        )
    except (ConnectionError, FileNotFoundError, OSError) as error:
        raise ArtifactError(
            f"the data of {', '.join(config.tasks)} failed to load ({type(error).__name__}: {str(error)[:200]}). "
            "Without the hub, give local tasks: task_folder=FOLDER with yaml tasks of `dataset_path: json`"
        ) from None
    assert found is not None
    return _flat(found)


def _flat(found: Any) -> Measurements:
    metrics: Measurements = {}
    for task, results in found["results"].items():
        n = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for name, value in results.items():
            metric, _, kind = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if metric in ("sample_len",):
                continue
            error = results.get(f"{metric}_stderr,{kind}")
            half = 1.96 * error if isinstance(error, int | float) and math.isfinite(error) else None
            suffix = f"/{kind}" if kind and kind != "none" else ""
            low, high = (None, None) if half is None else (value - half, value + half)
            metrics[f"lm_eval/{task}/{metric}{suffix}"] = Measurement(float(value), low, high, n)
    return metrics
