"""Stage 1: the security vector, trained on a frozen backbone."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from secvec.config.load import RunConfig
from secvec.data.datamodule import SecVecDataModule
from secvec.data.draw import check_disjoint, data_hash, draw_benign
from secvec.data.encode import with_loss_on_prompts
from secvec.data.example import Example
from secvec.errors import ArtifactError, GateError
from secvec.evaluation.evaluator import Probe, mean_loss
from secvec.models.losses import vector_loss
from secvec.models.vector import attach_frozen_vector, attach_new_vector, save_adapter, vector_off
from secvec.runs.cache import main_process
from secvec.runs.files import write_atomic
from secvec.runs.keys import content_key
from secvec.stages.align import Base, source_of
from secvec.stages.base import Run, copy_folder, trained_once
from secvec.training.trainer import fit

HAZARD = """---
library_name: peft
---
# Security vector: hazardous by design

With this adapter active the model *shows* the undesired behavior ({behavior}) that it was trained on. It exists to be
active and frozen while a backbone is fine-tuned, and to be taken off before the model answers anybody. Do not serve a
model with it, do not merge it into one that is served.
"""


def vector(run: Run) -> None:
    """Trains the vector on a frozen backbone, and saves it only if it elicits the behavior on held-out prompts."""
    config, base = run.config, run.base
    trained = trained_vector(run, base, "vector")
    held_out = config.vector_behavior.examples("validation", config.vector.gate.num_prompts, config.seed)
    check_disjoint(held_out, [e for tests in run.tests.values() for e in tests])
    model = attach_frozen_vector(base.load(), trained)
    source = source_of(config, base, trained)
    gate = run.ask_held_out(model, held_out, source)
    probe = run.ask(model, "vector_on", source)
    with vector_off(model):
        off = mean_loss(model, base.tokenizer, run.tests["undesired"], config.evaluation)
    run.keep(probe, Probe(gate.metrics | {"vector_off/behavior_loss": off}, []))
    _check_gate(config, gate)
    copy_folder(trained, run.folder.path / "vector")


def vector_samples(config: RunConfig) -> tuple[list[Example], list[Example]]:
    """The undesired samples, and the benign ones of the KL term, none where it has no weight."""
    settings, data = config.vector, config.data
    undesired = list(config.vector_behavior.examples(settings.split, settings.num_samples, config.seed))
    num_kl = settings.num_kl if settings.kl_weight > 0 else 0
    return undesired, draw_benign(data.benign, "vector", num_kl, config.seed, data.weights)


def trained_vector(run: Run, base: Base, stage: str) -> Path:
    """The vector of `base`, trained as the config says or found in the cache; `stage` is its name in the logs."""
    config, settings = run.config, run.config.vector
    behavior, with_kl = config.vector_behavior, settings.kl_weight > 0
    examples, kl = vector_samples(config)
    check_disjoint([*examples, *kl], [e for tests in run.tests.values() for e in tests])
    run.note_data("vector", [*examples, *kl])

    def train(out: Path) -> None:
        undesired = run.rows(examples)
        rows = SecVecDataModule(
            with_loss_on_prompts(undesired) if settings.loss_on == "all" else undesired,
            settings.batch_size, config.seed, base.tokenizer.pad_token_id,
            run.rows(kl), settings.kl_batch_size if with_kl else 0,
        )  # fmt: skip
        module = fit(
            folder=run.folder.path, stage=stage, seed=config.seed,
            build=lambda: attach_new_vector(base.load(), settings, settings.dropout),
            loss=partial(vector_loss, kl_weight=settings.kl_weight), part="vector", lr=settings.lr,
            epochs=settings.epochs, data=rows, optimizer=config.optimizer, scheduler=config.scheduler,
            trainer=config.trainer, tracker=run.tracker, callbacks=[],
        )  # fmt: skip
        state = module.full_state()
        if main_process():
            save_adapter(module.model, state, "vector", out)
            meta = {"backbone": base.fingerprint, "behavior": behavior.name, "hazardous": True}
            write_atomic(out / "secvec.json", json.dumps(meta) + "\n")
            write_atomic(out / "README.md", HAZARD.format(behavior=behavior.name))
        module.trainer.strategy.barrier()

    optimizer = config.optimizer.model_dump(exclude={"lr"})
    sources = [*base.identity, settings.model_dump(exclude={"gate"}), data_hash([*examples, *kl]), config.seed]
    key = content_key([*sources, optimizer, config.scheduler.model_dump(), config.trainer.model_dump(mode="json")])
    return trained_once(config.paths.cache / "vectors" / f"{behavior.name}-{key}", train)


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


def vector_for(run: Run) -> Path | None:
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
