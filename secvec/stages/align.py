"""The backbone that a run starts from: as given, or taught to refuse first and found again by content."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedTokenizerBase

from secvec.behaviors.base import Behavior
from secvec.config.load import AnyConfig, RunConfig
from secvec.data.datamodule import SecVecDataModule
from secvec.data.draw import data_hash, draw_benign
from secvec.data.encode import encode
from secvec.data.example import Example, Stream
from secvec.defenses.base import Defense
from secvec.errors import ConfigError, GateError
from secvec.evaluation.evaluator import Probe, evaluate_model
from secvec.evaluation.generation import Source, context_of
from secvec.evaluation.vllm import VllmEngine, how, uses_vllm
from secvec.models.backbone import check, fingerprint, load_backbone, load_config, load_tokenizer, locate, save_backbone
from secvec.models.tiny import build_tiny
from secvec.models.vector import backbone_state
from secvec.runs.cache import cached
from secvec.runs.files import atomic_path
from secvec.runs.keys import content_key
from secvec.runs.record import ANSWERS
from secvec.settings.schema import AlignSettings, BaseGateSettings, ModelSettings, TrainerSettings
from secvec.tracking.csv_file import CsvFile
from secvec.training.trainer import device_of, fit

log = logging.getLogger(__name__)

NUM_WORDS = 200
"""Samples of each stream whose words the tiny model's tokenizer is made of."""


@dataclass(frozen=True)
class Base:
    """The backbone that a run starts from."""

    folder: Path
    fingerprint: str
    settings: ModelSettings

    @property
    def identity(self) -> list[str]:
        """What tells a loaded copy from all others: its weights, and the type that they are loaded in."""
        return [self.fingerprint, self.settings.dtype]

    def load(self) -> nn.Module:
        """A fresh copy of it."""
        return load_backbone(self.folder, self.settings)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        return load_tokenizer(self.folder, self.settings.trust_remote_code)

    @cached_property
    def context(self) -> int:
        """The most tokens it takes; read from its config, not from loaded weights."""
        return context_of(load_config(self.folder, self.settings.trust_remote_code))


def base_for(config: AnyConfig) -> Base:
    """The base of a run: as given, or aligned first and cached by content."""
    settings = config.model
    if settings.align is None:
        if settings.name_or_path is None:
            raise tiny_unaligned()
        folder = locate(settings)
        return Base(folder, fingerprint(folder), settings)
    assert isinstance(config, RunConfig)
    align = settings.align
    examples = align_examples(config, align)
    source = None if settings.name_or_path is None else fingerprint(locate(settings))
    optimizer, scheduler = config.optimizer.model_dump(exclude={"lr"}), config.scheduler.model_dump()
    key = content_key([source, align.model_dump(exclude={"gate"}), data_hash(examples), optimizer, scheduler])
    folder = config.paths.cache / "models" / f"{settings.name}-{key}"
    cached(folder, partial(_align, config, examples, folder.with_suffix(".part")))
    base = Base(check(folder), fingerprint(folder), settings)
    if align.gate is not None:
        _check_gate(config, base, align.gate, align.seed)
    return base


def align_examples(config: AnyConfig, align: AlignSettings) -> list[Example]:
    """What the base is aligned on."""
    return [
        *_taught(config, align).examples("align", align.num_undesired, align.seed),
        *draw_benign(_kept(config), "align", align.num_benign, align.seed),
    ]


def source_of(config: AnyConfig, base: Base, vector: Path | None = None) -> Source:
    """How `base`, with the saved `vector` active, is asked; its answers stay in the run folder until the run ends."""
    settings, generation, engine = base.settings, config.generation, None
    if uses_vllm(generation, config.trainer):
        engine = VllmEngine(base.folder, vector, generation, settings.trust_remote_code)
    weights = [*base.identity, vector and fingerprint(vector)]
    return Source([*weights, how(generation, config.trainer)], Path(config.run_dir) / ANSWERS, engine)


def asked_once(
    config: AnyConfig, base: Base, tests: Mapping[str, Sequence[Example]], ask: Callable[[], Probe],
    behavior: Behavior,
) -> Probe:  # fmt: skip
    """What `ask` finds when it asks the base `tests` of `behavior`: kept, for every run that asks the same of it."""
    if dist.is_initialized():  # all processes must ask together, and a file may appear between two looks
        return ask()
    judges = [behavior.model_dump(mode="json"), config.judge and config.judge.model_dump(mode="json")]
    asked = data_hash([example for some in tests.values() for example in some])
    settings = [config.evaluation.model_dump(), how(config.generation, config.trainer)]
    key = content_key([*base.identity, asked, judges, *settings])

    def write(out: Path) -> None:
        out.write_text(json.dumps(asdict(ask())) + "\n", encoding="utf-8")

    kept = cached(config.paths.cache / "answers" / f"{key}.json", write)
    return Probe(**json.loads(kept.read_text(encoding="utf-8")))


def _check_gate(config: RunConfig, base: Base, wanted: BaseGateSettings, seed: int) -> None:
    """Raises GateError for a base that was not aligned well enough to each behavior that it was taught."""
    assert config.model.align is not None
    taught = _taught(config, config.model.align)
    n, judges = wanted.num_prompts, (taught, config.judge if taught is config.behavior else None)
    tests = {"undesired": taught.examples("validation", n, seed)}
    if streams := [stream for stream in _kept(config) if stream.kind == "ordinary"]:
        tests["ordinary"] = draw_benign(streams, "validation", n, seed)

    def ask() -> Probe:
        model = base.load().to(device_of(config.trainer))
        source = replace(source_of(config, base), folder=None)  # a base is checked before there is a run
        return evaluate_model(model, base.tokenizer, tests, *judges, config.evaluation, "base gate", source)

    found = asked_once(config, base, tests, ask, taught)
    faults = []
    for name, metric in found.metrics.items():
        _, *owner, name = name.split("/")
        value, of = metric["value"], f"{metric['n']} held-out prompts" + "".join(f" of {one}" for one in owner[1:])
        if name == "behavior_rate" and value > wanted.max_behavior_rate:
            faults.append(
                f"it shows the behavior on {value:.1%} of {of}, "
                f"above model.align.gate.max_behavior_rate={wanted.max_behavior_rate:.1%}"
            )
        if name == "wanted_rate" and value < wanted.min_wanted_rate:
            faults.append(
                f"it refuses, or answers as it should, {value:.1%} of {of}, "
                f"below model.align.gate.min_wanted_rate={wanted.min_wanted_rate:.1%}"
            )
        if name == "retained_accuracy" and value < wanted.min_retained_accuracy:
            faults.append(
                f"it answers {value:.1%} of {metric['n']} ordinary held-out prompts as taught, "
                f"below model.align.gate.min_retained_accuracy={wanted.min_retained_accuracy:.1%}"
            )
    if faults:
        raise GateError(
            f"the base is not fit to start from: {' and '.join(faults)}. There would be little to protect. Align it "
            "longer (model.align.epochs), on more samples (model.align.num_undesired, model.align.num_benign), at "
            f"another rate (model.align.lr) or seed (model.align.seed). It is in {base.folder}."
        )


def _taught(config: AnyConfig, align: AlignSettings) -> Behavior:
    behavior: Behavior = align.behavior or config.behavior
    return behavior


def _kept(config: AnyConfig) -> list[Stream]:
    """What the base knows before fine-tuning."""
    return [stream for stream in config.data.benign if stream.kind != "task"]


def _align(config: RunConfig, examples: list[Example], work: Path, out: Path) -> None:
    align, settings = config.model.align, config.model
    assert align is not None
    start = locate(settings) if settings.name_or_path else _tiny_start(config, examples, work / "start")
    counts = align.num_undesired, align.num_benign
    log.info("aligning %s on %d wanted answers and %d ordinary samples (kept for later runs)", settings.name, *counts)
    before = Base(start, "", settings)
    rows = encode(examples, before.tokenizer, before.context)
    with _threads(align.num_threads):
        module = fit(
            folder=work, stage="align", seed=align.seed, build=before.load, loss=Defense(name="none").loss,
            part="backbone", lr=align.lr, epochs=align.epochs,
            data=SecVecDataModule(rows, align.batch_size, align.seed, before.tokenizer.pad_token_id),
            optimizer=config.optimizer, scheduler=config.scheduler, trainer=alone(config.trainer),
            tracker=CsvFile(work / "metrics.csv"), callbacks=[],
        )  # fmt: skip
    save_backbone(backbone_state(module.full_state()), start, settings, out)
    shutil.rmtree(work)


@contextmanager
def _threads(n: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tiny_start(config: RunConfig, examples: list[Example], folder: Path) -> Path:
    """The tiny model before alignment."""
    assert config.model.align is not None
    seed = config.model.align.seed
    with atomic_path(folder) as temporary:
        for part in build_tiny(tiny_texts(config, examples, seed), seed):
            part.save_pretrained(temporary)
    return folder


def tiny_texts(config: AnyConfig, examples: Sequence[Example], seed: int) -> list[str]:
    """What the tiny model's tokenizer is made of: it knows the words of all data, as a pretrained one would."""
    assert config.model.align is not None
    words = [*examples, *_taught(config, config.model.align).examples("vector", NUM_WORDS, seed)]
    words += [example for stream in config.data.benign for example in stream.examples("vector", NUM_WORDS, seed)]
    return [text for e in words for text in (e.prompt, e.response)]


def tiny_unaligned() -> ConfigError:
    """The built-in model without an alignment."""
    return ConfigError("model.name_or_path=null is the built-in tiny model, which needs model.align to be of use")


def alone(settings: TrainerSettings) -> TrainerSettings:
    """The same on one device: a base must not depend on how many devices its runs have."""
    return settings.model_copy(update={"devices": 1, "num_nodes": 1, "strategy": "auto", "accumulate_grad_batches": 1})
