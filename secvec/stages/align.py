"""Before the stages: a starting model that must refuse first is taught to, once, and found again by content.

No stage of the method, but trained as one: it is the finetune stage without a defense, on one device.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from secvec.data.datamodule import training_loader
from secvec.data.draw import data_hash, draw_benign
from secvec.data.encode import encode
from secvec.data.example import Example, Stream
from secvec.defenses.base import Defense
from secvec.errors import ConfigError, GateError
from secvec.metrics import Measurements
from secvec.models.backbone import Backbone, locate
from secvec.models.tiny import build_tiny
from secvec.runs.cache import cached
from secvec.runs.files import atomic_path
from secvec.runs.keys import content_key
from secvec.runs.processes import main_process
from secvec.settings.schema import BaseGateSettings
from secvec.stages.base import Workload
from secvec.training.trainer import Training, device_type, fit

if TYPE_CHECKING:
    from secvec.behaviors.base import Behavior
    from secvec.config.schema import AlignSettings, DataSettings
    from secvec.planning.budget import Budget
    from secvec.run import Run

log = logging.getLogger(__name__)

LEARNING_RATE = "model.align.lr"
NUM_WORDS = 200
"""Samples of each stream whose words the tiny model's tokenizer is made of."""


def starting_model(run: Run) -> Backbone:
    """The backbone that a run starts from: as given, or aligned first and cached by content. Raises SecVecError."""
    config, settings = run.config, run.config.model
    if settings.align is None:
        if settings.name_or_path is None:
            raise tiny_unaligned()
        return Backbone.of(settings)
    align = settings.align
    taught = align.behavior or config.behavior
    examples = align_examples(taught, config.data, align)
    words = None if settings.name_or_path else tiny_texts(taught, config.data, align, examples)
    source = Backbone.of(settings).identity if words is None else words
    training = [config.optimizer.model_dump(exclude={"lr"}), config.scheduler.model_dump()]
    training += [config.trainer.model_dump(include={"precision", "gradient_clip_val"}), device_type(config.trainer)]
    recipe = align.model_dump(exclude={"gate", "behavior"})
    key = content_key([source, settings.dtype, settings.packing, recipe, data_hash(examples), *training])
    folder = config.paths.cache / "models" / f"{settings.name}-{key}"
    work = folder.with_name(f"{folder.name}.part")
    backbone = Backbone(cached(folder, lambda out: _train(run, examples, words, work, out)), settings)
    if main_process():
        shutil.rmtree(work, ignore_errors=True)  # its checkpoints go when the result is in its place
    if align.gate is not None:
        _check_gate(run, backbone, taught, align, align.gate)
    return backbone


def plan_align(budget: Budget) -> Workload | None:
    """The training, where there is one; later runs find its result in the cache."""
    align = budget.config.model.align
    if align is None:
        return None
    return Workload(
        part="backbone",
        trained=budget.parts["backbone"],
        samples={"undesired": align.num_undesired, "benign": align.num_benign},
        epochs=align.epochs,
        batch_size=align.batch_size,
        on_one_device=True,
        saved={"backbone": ("aligned base (in the cache)", 1)},
    )


def align_examples(taught: Behavior, data: DataSettings, align: AlignSettings) -> list[Example]:
    """The samples of the alignment: `taught` is the behavior whose wanted answers are learned."""
    return [
        *taught.examples("align", align.num_undesired, align.seed),
        *draw_benign(_known_streams(data), "align", align.num_benign, align.seed),
    ]


def _train(run: Run, examples: Sequence[Example], words: Sequence[str] | None, work: Path, out: Path) -> None:
    config, settings, align = run.config, run.config.model, run.config.model.align
    start = locate(settings) if words is None else _tiny_start(words, align.seed, work / "start")
    backbone = Backbone(start, settings)
    log.info(
        "aligning %s on %d wanted answers and %d ordinary samples (kept for later runs)",
        settings.name,
        align.num_undesired,
        align.num_benign,
    )
    module = run.module("finetune", backbone, lr=align.lr, defense=Defense(name="none"))
    rows = encode(examples, backbone.tokenizer, backbone.context)
    data = training_loader([(rows, align.batch_size)], align.seed)
    training = Training(work, "align", LEARNING_RATE, align.seed, align.epochs, config.trainer.on_one_device(), False)
    with _threads(align.num_threads):
        fit(module, data, training, run.curves(training, work / "metrics.csv"), work)
    module.release()
    shutil.move(work / "backbone", out)


def _tiny_start(words: Sequence[str], seed: int, folder: Path) -> Path:
    """The tiny model before alignment."""
    with atomic_path(folder) as temporary:
        for part in build_tiny(words, seed):
            part.save_pretrained(temporary)
    return folder


def tiny_texts(taught: Behavior, data: DataSettings, align: AlignSettings, examples: Sequence[Example]) -> list[str]:
    """The texts for the tiny model's tokenizer: it knows the words of all data, as a pretrained one would."""
    sources: list[Behavior | Stream] = [taught, *data.serving("vector")[0]]
    words = [*examples, *(e for source in sources for e in source.examples("vector", NUM_WORDS, align.seed))]
    return [text for e in words for text in (e.prompt, e.response)]


def tiny_unaligned() -> ConfigError:
    """The built-in model without an alignment."""
    return ConfigError("model.name_or_path=null is the built-in tiny model, which needs model.align to be of use")


def _known_streams(data: DataSettings) -> list[Stream]:
    """The streams that the model knows before fine-tuning."""
    return [stream for stream in data.serving("align")[0] if stream.kind != "task"]


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_gate(run: Run, backbone: Backbone, taught: Behavior, align: AlignSettings, gate: BaseGateSettings) -> None:
    """Raises GateError for a starting model that was not aligned well enough to each behavior that it was taught."""
    config, n = run.config, gate.num_prompts
    tests = {"undesired": taught.examples("validation", n, align.seed)}
    if streams := [stream for stream in _known_streams(config.data) if stream.kind == "ordinary"]:
        tests["ordinary"] = draw_benign(streams, "validation", n, align.seed)
    module = run.inference_module(backbone, keep_answers=False)
    evaluator = run.evaluator(tests, align.behavior, config.trainer.on_one_device())
    faults = _gate_faults(run.evaluate_once(module, "base gate", evaluator).metrics, gate)
    module.release()
    if faults:
        raise GateError(
            f"the aligned model failed its gate: {' and '.join(faults)}. There would be little to protect. Align it "
            "longer (model.align.epochs), on more samples (model.align.num_undesired, model.align.num_benign), at "
            f"another rate (model.align.lr) or seed (model.align.seed). It is in {backbone.folder}."
        )


def _gate_faults(metrics: Measurements, gate: BaseGateSettings) -> list[str]:
    faults = []
    for path, metric in metrics.items():
        _, *owner, name = path.split("/")
        value, of = metric.value, f"{metric.n} held-out prompts" + "".join(f" of {one}" for one in owner[1:])
        if name == "behavior_rate" and value > gate.max_behavior_rate:
            faults.append(
                f"it shows the behavior on {value:.1%} of {of}, "
                f"above model.align.gate.max_behavior_rate={gate.max_behavior_rate:.1%}"
            )
        if name == "wanted_rate" and value < gate.min_wanted_rate:
            faults.append(
                f"it refuses, or answers as it should, {value:.1%} of {of}, "
                f"below model.align.gate.min_wanted_rate={gate.min_wanted_rate:.1%}"
            )
        if name == "retained_accuracy" and value < gate.min_retained_accuracy:
            faults.append(
                f"it answers {value:.1%} of {metric.n} ordinary held-out prompts as taught, "
                f"below model.align.gate.min_retained_accuracy={gate.min_retained_accuracy:.1%}"
            )
    return faults
