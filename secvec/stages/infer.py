"""Stage 3: what the fine-tuned backbone answers without the vector, and with it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from secvec.errors import ArtifactError
from secvec.evaluation.evaluator import Metrics, Probe, deactivation_gap, kl_to_base, mean_loss, perplexity
from secvec.models.backbone import check, fingerprint
from secvec.models.vector import attach_frozen_vector
from secvec.runs.record import REFITTED
from secvec.stages.align import Base, asked_once, source_of
from secvec.stages.base import Run
from secvec.stages.vector import vector_for


def infer(run: Run) -> None:
    """Questions the base, the fine-tuned backbone with the vector (`active`) and without it (`after`)."""
    backbone = run.folder.path / "backbone"
    if not backbone.is_dir():
        raise ArtifactError(f"no fine-tuned backbone in {backbone}: run stage=finetune with the same settings first")
    tuned = Base(check(backbone), fingerprint(backbone), run.base.settings)
    source = source_of(run.config, tuned)
    run.keep(_asked_base(run))
    model = tuned.load()
    after = run.ask(model, "after", source)
    run.keep(Probe(_distance_from_base(run, model, after), []), run.leaks(model, "after", source))
    del model  # room for the next
    adapter = vector_for(run)
    if run.config.finetune.refits:
        adapter = run.folder.path / REFITTED
    if adapter is None:
        active = Probe(
            {name.replace("after/", "active/"): value for name, value in after.metrics.items()},
            [row | {"phase": "active"} for row in after.predictions],
        )
    else:
        with_vector = source_of(run.config, tuned, adapter)
        active = run.ask(attach_frozen_vector(tuned.load(), adapter), "active", with_vector)
    run.keep(active, after, Probe(deactivation_gap(active.predictions, after.predictions), []))


def _asked_base(run: Run) -> Probe:
    def ask() -> Probe:
        return run.ask_all(run.base.load(), "base", source_of(run.config, run.base))

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
