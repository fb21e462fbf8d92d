"""The generation backend of a run, and evaluations that are kept for all runs that ask the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist

from secvec.errors import ConfigError
from secvec.evaluation.generation import GenerationBackend
from secvec.evaluation.verdicts import EvaluationResult
from secvec.evaluation.vllm import VllmEngine, backend_info, uses_vllm
from secvec.metrics import Measurement
from secvec.models.backbone import Backbone
from secvec.runs.cache import cached, from_first, main_process
from secvec.runs.content import folder_digest
from secvec.settings.schema import GenerationSettings
from secvec.settings.trainer import TrainerSettings


def generation_backend(
    backbone: Backbone,
    vector: Path | None,
    generation: GenerationSettings,
    trainer: TrainerSettings,
    folder: Path | None,
) -> GenerationBackend:
    """What generates for `backbone` with the saved `vector`; finished batches are kept in `folder`."""
    engine = None
    if uses_vllm(generation, trainer):
        if backbone.settings.quantization:
            raise ConfigError("model.quantization=nf4: vLLM would answer with the whole weights. Set generation=hf")
        engine = VllmEngine(backbone.folder, vector, generation, backbone.settings.trust_remote_code)
    identity = [*backbone.identity, vector and folder_digest(vector), backend_info(generation, trainer)]
    return GenerationBackend(identity, folder, engine)


def kept_result(path: Path, evaluate: Callable[[], EvaluationResult]) -> EvaluationResult:
    """The result in `path`, evaluated first where there is none yet. Every process must call it.

    One with verdicts that could not be read is evaluated again: the judge may give them this time.
    """
    if not dist.is_initialized():
        return _read(cached(path, lambda out: _write(out, evaluate()), _is_whole))
    found = from_first(lambda: _read(path) if _is_whole(path) else None)
    if found is None:
        found = evaluate()  # all processes together, and none of them holds a lock meanwhile
        if main_process():
            cached(path, lambda out: _write(out, found), _is_whole)
    return found


def _is_whole(path: Path) -> bool:
    return path.is_file() and all(row.get("verdict") != "unparsable" for row in _read(path).predictions)


def _write(path: Path, result: EvaluationResult) -> None:
    path.write_text(json.dumps(asdict(result)) + "\n", encoding="utf-8")


def _read(path: Path) -> EvaluationResult:
    kept = json.loads(path.read_text(encoding="utf-8"))
    metrics = {name: Measurement(**measured) for name, measured in kept["metrics"].items()}
    return EvaluationResult(metrics, kept["predictions"])
