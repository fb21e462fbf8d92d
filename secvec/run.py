"""A run from its config to its record: `train` for the stages, `evaluate` for any saved backbone."""

from __future__ import annotations

import logging
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import replace
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from secvec.behaviors.base import Behavior
from secvec.config.replay import replay_yaml
from secvec.config.schema import AnyConfig, EvaluateConfig, RunConfig
from secvec.data.batch import collate
from secvec.data.datamodule import SecVecDataModule
from secvec.data.draw import data_hash
from secvec.data.encode import untrainable_reason
from secvec.data.example import Example
from secvec.data.prompts import Answer, prompt_set
from secvec.defenses.base import Defense, Preparation
from secvec.errors import ArtifactError, ConfigError, DataError, GateError, nearest
from secvec.evaluation.answer_cache import kept_result
from secvec.evaluation.evaluator import Evaluator
from secvec.evaluation.generation import generation_backend
from secvec.evaluation.leak_probes import read_context
from secvec.evaluation.losses import sample_losses
from secvec.evaluation.prediction import answers
from secvec.evaluation.scan import RowScore, kept_scores, quantile_threshold, scan, share_above
from secvec.evaluation.scan_file import ScanFile
from secvec.evaluation.verdicts import EvaluationResult
from secvec.evaluation.vllm import backend_info
from secvec.metrics import Measurements, mean, proportion
from secvec.models.backbone import Backbone, LedgerRow
from secvec.models.vector import vector_digest, vector_info
from secvec.module import SecVecModule
from secvec.planning.table import plan
from secvec.report import scan_page
from secvec.runs.cache import built_once, cached, prepare_cache
from secvec.runs.console import metrics_table
from secvec.runs.content import by_content
from secvec.runs.folder import ANSWERS, RunFolder
from secvec.runs.keys import content_key
from secvec.runs.processes import main_process, rank_and_world, wait_for_all
from secvec.runs.record import UNKNOWN, Record, Weights
from secvec.settings.schema import LoraSettings, VectorLora
from secvec.settings.target import to_target
from secvec.settings.trainer import TrainerSettings
from secvec.stages import STAGES
from secvec.stages.align import starting_model
from secvec.stages.base import training_key
from secvec.tracking.base import Tracker, Trackers
from secvec.tracking.csv_file import CsvFile, read_curves
from secvec.tracking.lightning import StageCurves
from secvec.tracking.session import Session, tracker_for
from secvec.training.activations import mean_outputs
from secvec.training.callbacks import build_callbacks
from secvec.training.trainer import Training, check_trainer, device_of, device_type, fit, launch

log = logging.getLogger(__name__)


class Run:
    """One run folder, and what its stages work with: modules, data, training, evaluation."""

    def __init__(self, config: Any, folder: RunFolder, tracker: Tracker):
        self.config: Any = config
        """A RunConfig, or an EvaluateConfig."""
        self.folder, self.tracker = folder, tracker
        self.scanned = Counter[str]()
        """Rows that a defense has scanned, and those that were flagged."""

    @cached_property
    def backbone(self) -> Backbone:
        """The model that the run starts from."""
        return starting_model(self)

    @cached_property
    def data(self) -> SecVecDataModule:
        """All data of the run."""
        return SecVecDataModule.of(self.config)

    def saved_vector(self) -> Path | None:
        """The folder of the vector that the defense uses; None: it uses none.

        Raises ArtifactError where it is missing, or was trained on another backbone.
        """
        if not self.config.defense.uses_vector:
            return None
        folder = self.config.vector.path or self.folder.path / "vector"
        if not folder.is_dir():
            raise ArtifactError(
                f"no vector in {folder}: run stage=vector with the same settings first, or give vector.path=FOLDER"
            )
        self.backbone.check_vector(folder)
        return folder

    def module(
        self,
        stage: str,
        backbone: Backbone,
        lr: float,
        vector: VectorLora | Path | None = None,
        defense: Defense | None = None,
        tune: LoraSettings | None = None,
    ) -> SecVecModule:
        """A module that trains at the rate `lr`, with the defense and LoRA of the run, or with both of those given."""
        config, given = self.config, defense is not None
        return SecVecModule(
            stage,
            backbone,
            vector,
            defense=defense if given else config.defense,
            tune=tune if given else config.tune.lora,
            optimizer=config.optimizer.model_copy(update={"lr": lr}),
            scheduler=config.scheduler,
        )

    def inference_module(
        self, backbone: Backbone, vector: Path | None = None, keep_answers: bool = True
    ) -> SecVecModule:
        """A module that answers; finished batches stay in the run folder until the run has ended."""
        folder = Path(self.config.run_dir) / ANSWERS if keep_answers else None
        module = SecVecModule("infer", backbone, vector)
        module.generation = generation_backend(backbone, vector, self.config.generation, self.config.trainer, folder)
        return module

    @contextmanager
    def answering(self, backbone: Backbone, vector: Path | None = None) -> Iterator[SecVecModule]:
        """As `inference_module`; at the end its model is freed, so that the next one has room."""
        module = self.inference_module(backbone, vector)
        try:
            yield module
        finally:
            module.release()

    def fit(
        self,
        module: SecVecModule,
        label: str,
        epochs: int,
        out: Path,
        callbacks: Sequence[L.Callback] = (),
        data: SecVecDataModule | None = None,
    ) -> list[LedgerRow]:
        """Trains `module` on the data of its stage and saves it below `out`; default: on the data of the run.

        Its checkpoints stay until `built_once`, or who keeps the result otherwise, drops them.

        `label` names the training in logs, curves and checkpoints. Returns the ledger of the model, which is freed. The
        callbacks of the config act on the data of the run alone: they know its curves.
        """
        config = self.config
        given = build_callbacks(config.callbacks, module.stage.name) if data is None else []
        data = data or self.data
        training = Training(
            self.folder.path,
            label,
            module.stage.learning_rate,
            config.seed,
            epochs,
            config.trainer,
            validates=config.evaluation.validation.num_samples != 0,
            checkpoint=config.checkpoint,
        )
        self.folder.record.checkpoint_bytes[label] = fit(
            module,
            data,
            training,
            self.curves(training),
            out,
            [*callbacks, *given],
        )
        rows = module.ledger()
        data.trainer = None  # it holds the optimizer, and that the weights
        module.release()
        return rows

    def prepare(self, preparation: Preparation) -> Path:
        """The folder of a training of the starting model, kept for every run that asks for the same.

        It holds what the finetune stage saves: `task/` where a LoRA is trained, else `backbone/`.

        Raises GateError where the loss on its samples is no lower afterwards.
        """
        plan, backbone = preparation, self.backbone
        recipe = [by_content(to_target(plan.defense)), plan.lr, plan.epochs, plan.batch_size]
        recipe += [plan.tune and plan.tune.model_dump(), plan.vector and vector_digest(plan.vector)]
        key = training_key(self, backbone, [*plan.samples, *plan.extra], recipe)

        def build(out: Path) -> None:
            data = copy(self.data)
            data.mixtures = [{"undesired": [], "benign": list(plan.samples)}]
            data.cycle, data.extra = 0, list(plan.extra)
            data.finetune = data.finetune.model_copy(update={"batch_size": plan.batch_size})
            module = self.module("finetune", backbone, plan.lr, plan.vector, plan.defense, plan.tune)
            self.fit(module, "preparation", plan.epochs, out, data=data)
            self._check_prepared(plan, backbone.at(out / "backbone"))
            if plan.tune and main_process():
                shutil.rmtree(out / "backbone")

        return self.built_once(self.config.paths.cache / "preparations" / key, build, "preparation")

    def _check_prepared(self, plan: Preparation, prepared: Backbone) -> None:
        found = []
        for backbone in (self.backbone, prepared):
            with self.answering(backbone, plan.vector) as module:
                found.append(self.losses(module, {"samples": plan.samples})["samples"].value)
        if not found[1] < found[0]:
            raise GateError(
                f"defense={self.config.defense.name}: its training before the fine-tune does not lower the loss on its "
                f"samples ({found[0]:.4f} nats per token before, {found[1]:.4f} after): the fine-tune would begin at a "
                "model that has learned nothing. Change defense.lr or defense.epochs"
            )

    def built_once(self, path: Path, build: Callable[[Path], None], label: str) -> Path:
        """`path` in the cache, built by the training `label` where it is not there yet. Every process must call it.

        Its checkpoints go only then: a process that is killed at any time trains nothing again.
        """
        built_once(path, build)
        self.folder.drop_checkpoints(label)
        return path

    def curves(self, training: Training, path: Path | None = None) -> StageCurves:
        """The Lightning logger of a training: the trackers of the run, or the CSV file `path` alone."""
        tracker = self.tracker if path is None else CsvFile(path)
        return StageCurves(tracker, training.label, training.resumes)

    def copy_curves(self, source: Path, stage: str) -> None:
        """Passes the curves of `stage` in the run folder `source` to the trackers of this run.

        Those of answers are left out: they were judged under the settings of that run.
        """
        if main_process() and (source / "metrics.csv").is_file():
            self.tracker.begin_stage(stage, False)
            for step, values in read_curves(source / "metrics.csv", stage):
                self.tracker.curves(stage, step, {n: v for n, v in values.items() if not n.startswith("during/")})

    def evaluator(
        self,
        tests: Mapping[str, Sequence[Example]] | None = None,
        behavior: Behavior | None = None,
        trainer: TrainerSettings | None = None,
    ) -> Evaluator:
        """How models are evaluated; default: on the run's test prompts. A `behavior` is judged by its own judge."""
        config = self.config
        judge = None if behavior and behavior.has_judge else config.judge
        return Evaluator(
            self.data.tests if tests is None else tests,
            behavior or config.behavior,
            judge,
            config.evaluation,
            trainer or config.trainer,
            config.answer_judge,
            self.training_context,
        )

    @property
    def processes(self) -> int:
        """How many there are now; `launch` starts all but the first."""
        return rank_and_world()[1]

    @property
    def training_context(self) -> list[Example]:
        """Rows that the fine-tuned backbone was trained on; none before its training."""
        evaluates = isinstance(self.config, EvaluateConfig)
        return read_context(self.backbone.folder.parent if evaluates else self.folder.path)

    def evaluate(
        self, module: SecVecModule, phase: str, evaluator: Evaluator | None = None, leaks: bool = False
    ) -> EvaluationResult:
        """Responses and metrics of `module`; their names begin with `phase`."""
        with self._evaluation():
            return (evaluator or self.evaluator()).evaluate(module, phase, leaks)

    def evaluate_once(
        self, module: SecVecModule, phase: str, evaluator: Evaluator | None = None, leaks: bool = False
    ) -> EvaluationResult:
        """As `evaluate`; the result is kept for every run that asks the same of the same model."""
        config, evaluator = self.config, evaluator or self.evaluator()
        examples = data_hash([example for kind in evaluator.tests.values() for example in kind])
        asked = (evaluator.behavior, evaluator.judge, evaluator.answer_judge)
        judges = [by_content(to_target(one)) if one else None for one in asked]
        settings = [
            evaluator.settings.model_dump(exclude={"validation"}),
            backend_info(config.generation, config.trainer),
            [device_type(evaluator.trainer), evaluator.trainer.precision],
        ]
        asked_in = data_hash(evaluator.context) if leaks else None
        key = content_key([module.backbone.identity, examples, judges, *settings, phase, leaks, asked_in])
        path = config.paths.cache / "answers" / f"{key}.json"
        return kept_result(path, lambda: self.evaluate(module, phase, evaluator, leaks))

    def own_answers(self) -> list[Example]:
        """The vector's prompts with the greedy answers of the starting model, kept for every run that asks for them.

        One that `evaluation.max_new_tokens` cuts is trained without an end, and without the half of a character.
        """
        config, backbone, examples = self.config, self.backbone, self.data.vector_samples["undesired"]
        settings = [config.evaluation.max_new_tokens, backend_info(config.generation, config.trainer)]
        device = [device_type(config.trainer), config.trainer.precision]
        key = content_key([Answer._fields, backbone.identity, data_hash(examples), *settings, *device])

        def answer() -> EvaluationResult:
            asked = prompt_set(examples, backbone.tokenizer)
            with self._evaluation(), self.answering(backbone) as module:
                (own,) = answers(module, [asked], config.evaluation, config.trainer, "own answers")
            return EvaluationResult({}, [answer._asdict() for answer in own])

        rows = kept_result(config.paths.cache / "own_answers" / f"{key}.json", answer).predictions
        given = [
            replace(example, response=row["text"].rstrip("\ufffd") if row["cut"] else row["text"], cut=row["cut"])
            for example, row in zip(examples, rows, strict=True)
        ]
        return [example for example in given if not untrainable_reason(example, backbone.tokenizer)]

    def activations(self, layer: int | None) -> Path:
        """A file with mean activations of the starting model, at the output of a layer, over response tokens.

        Tensors (N, H), row by row of the same prompts: `undesired`, the vector's samples, and `own`, the model's own
        answers. Raises DataError where it has none. Kept for every run that asks for the same.
        """
        config, backbone = self.config, self.backbone
        own = {example.messages: example for example in self.own_answers()}
        pairs = [(row, own[row.messages]) for row in self.data.vector_samples["undesired"] if row.messages in own]
        if not pairs:
            raise DataError("the starting model has no usable answer to any of the vector's prompts")
        kinds = dict(zip(("undesired", "own"), map(list, zip(*pairs, strict=True)), strict=True))
        device, size = device_of(config.trainer), config.evaluation.batch_size
        hashes = [data_hash(rows) for rows in kinds.values()]
        key = content_key([backbone.identity, hashes, layer, device.partition(":")[0]])

        def read(out: Path) -> None:
            model: Any = backbone.load()
            model.to(device)
            rows = {kind: [(row, False) for row in self.data.rows(of, backbone)] for kind, of in kinds.items()}
            batches = {k: [collate(r[i : i + size]) for i in range(0, len(r), size)] for k, r in rows.items()}
            save_file({kind: mean_outputs(model, layer, of) for kind, of in batches.items()}, out)

        return cached(config.paths.cache / "activations" / f"{key}.safetensors", read)

    def losses(
        self, module: SecVecModule, examples: Mapping[str, Sequence[Example]], without_vector: bool = False
    ) -> Measurements:
        """Nats per response token of each kind of `examples`; mean and interval are over the samples' own means."""
        config = self.config
        with self._evaluation():
            found = sample_losses(module, examples, config.evaluation, config.trainer, without_vector)
        return {kind: mean(losses) for kind, losses in found.items()}

    def scan(self, module: SecVecModule, examples: Sequence[Example]) -> list[RowScore]:
        """How much the vector of `module` explains of each of `examples`."""
        config = self.config
        with self._evaluation():
            size, trainer, cache = config.evaluation.batch_size, config.trainer, config.paths.cache
            return scan(module, examples, batch_size=size, trainer=trainer, cache=cache)

    def check_monitors(self, stage: str) -> None:
        """Raises ConfigError for a callback of `stage` that waits for a metric which nothing measures.

        Lightning would stop the training at the end of its first epoch.
        """
        settings = self.config.evaluation.validation
        kinds = self.data.validation(settings.num_samples)
        states = ("", "_vector_on") if self.config.defense.uses_vector else ("",)
        measured = [f"val/{kind}_loss{state}" for kind in kinds for state in states]
        for name, callback in self.config.callbacks.items():
            monitor = (callback.model_extra or {}).get("monitor")
            if monitor is None or stage not in callback.stages or monitor in (*measured, "epoch", "step"):
                continue
            if not str(monitor).startswith("train/"):
                raise ConfigError(
                    f"callbacks.{name}.monitor={monitor} is not measured{nearest(str(monitor), measured)}: of held-out "
                    f"samples there is {', '.join(measured) or 'nothing (evaluation.validation.num_samples)'}; of the "
                    "training, train/loss"
                )

    def check_limits(self, rows: int, batch_size: int) -> None:
        """Raises ConfigError for a limit of the Trainer that leaves no batch of an epoch, or exceeds them."""
        batches, extra = ceil(rows / batch_size), self.config.trainer.model_extra or {}
        share, every = extra.get("limit_train_batches"), extra.get("val_check_interval")
        if isinstance(share, float) and int(batches * share) < 1:
            raise ConfigError(
                f"trainer.limit_train_batches={share} leaves none of the {batches} batches of an epoch: give a number "
                "of batches, or a larger share"
            )
        if isinstance(every, int) and every > batches and extra.get("check_val_every_n_epoch", 1) is not None:
            raise ConfigError(
                f"trainer.val_check_interval={every} exceeds the {batches} batches of an epoch: give at most that, or "
                "trainer.check_val_every_n_epoch=null too, which counts batches over epochs"
            )

    def check_scan(self) -> None:
        """Raises ConfigError for a vector without scores of benign rows: nothing would say which scores are high."""
        path, remedy = self.config.vector.path, "with KL rows (vector.num_kl and vector.kl_weight above 0)"
        if path is None and not self.data.vector_samples["kl"]:
            raise ConfigError(f"no KL rows say which scores of a scan are high: train the vector {remedy}")
        if path is not None and not any(kept_scores(path).get("benign", [])):
            raise ConfigError(f"vector.path={path} holds no scores of benign rows: give one of stage=vector, {remedy}")

    def unflagged(self, samples: Mapping[str, list[Example]], window: int, quantile: float) -> dict[str, list[Example]]:
        """Those of `samples` whose highest gap over `window` tokens is no higher than the `quantile` of the KL rows.

        The vector is that of the run. Raises DataError where none is left.
        """
        vector = self.saved_vector()
        assert vector is not None
        benign = kept_scores(vector)["benign"][window - 1]
        most, by_chance = quantile_threshold(benign, quantile), share_above(len(benign), quantile)
        with self.answering(self.backbone, vector) as module:
            kept = {
                kind: [row for row, of in zip(rows, self.scan(module, rows), strict=True) if of.score(window) <= most]
                for kind, rows in samples.items()
            }
        rows, left = (sum(map(len, of.values())) for of in (samples, kept))
        if not left:
            raise DataError(f"the scan flags all {rows} rows (scores above {most:.2f} nats)")
        self.scanned += Counter(all=rows, flagged=rows - left)  # of all cycles
        overall = proportion(self.scanned["flagged"], self.scanned["all"])
        self.folder.record.metrics["scan/flagged_share"] = overall
        share = proportion(rows - left, rows)
        if share.value <= scan_page.CLEAN * by_chance:
            log.warning(
                "the scan flags %d of %d rows, no more than by chance: the data do not show this vector's "
                "behavior, or show it in a form that the vector does not cover", rows - left, rows,
            )  # fmt: skip
        else:
            log.info("the scan flags %d of %d rows, and leaves them out", rows - left, rows)
        return kept

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """Adds the seconds of evaluation to the record; those of the stages include them."""
        began, seconds = time.monotonic(), self.folder.record.wall_seconds
        yield
        seconds["evaluation"] = round(seconds.get("evaluation", 0.0) + time.monotonic() - began, 3)

    def save_results(self, *results: EvaluationResult) -> None:
        """Puts metrics and predictions into the run folder."""
        for result in results:
            self.folder.record.metrics |= result.metrics
            self.folder.add_predictions(result.predictions)

    def note_data(self, split: str, examples: Sequence[Example]) -> None:
        """Hash and counts of the data of a split, for the record."""
        kinds = [example.kind for example in examples]
        self.folder.record.data.sha256[split] = data_hash(examples)
        self.folder.record.data.counts[split] = {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def train(config: RunConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Runs the stages of `config` in its run folder and returns the record.

    A stage that ended well there before is not run again (`force=true` runs it again). Raises SecVecError for what the
    user can fix; the record then says `failed` and why.
    """
    if config.plan:
        return _plan(config)
    check_trainer(config.trainer, config.num_threads)
    folder = _open(config, overrides)
    if folder.finished(config.stages) and not config.force:
        folder.complete()
        log.info("already finished: %s (force=true runs it again)", folder.path)
        return folder.record.as_dict()
    tracker = tracker_for(folder.path, config.logger, config.force) if main_process() else Trackers()
    with Session(tracker, folder.path, folder.record, config.logger) as session, folder.running():
        session.open()
        if config.force and main_process():  # other ranks start after this and read the record that it leaves
            folder.forget(config.stages, [name for stage in config.stages for name in STAGES[stage].artifacts])
            later = list(STAGES)[list(STAGES).index(config.stages[-1]) + 1 :]
            folder.forget(later, [])  # they are of what is replaced
            folder.drop_metrics([prefix for name in later for prefix in STAGES[name].measures])
        run = Run(config, folder, tracker)
        run.data.check(config.stages)
        folder.record.base = _weights(run.backbone)
        wanted = [name for name in config.stages if name not in folder.record.stages]
        run.data.fit_to(run.backbone.tokenizer, run.backbone.context, [*config.stages, "infer"])
        for name in wanted:
            STAGES[name].check(run)
        launch(config.trainer)
        for name in wanted:
            began, stage = time.monotonic(), STAGES[name]
            with session.stage():
                folder.drop_metrics(stage.measures)
                stage.run(run)
                wait_for_all()  # the next stage reads what rank 0 has just written
                folder.record.wall_seconds[name] = round(time.monotonic() - began, 3)
                folder.record.processes[name] = run.processes
                folder.record.peak_bytes = _peak_bytes()
                folder.record.stages.append(name)
                folder.save()
            shown = {n: m for n, m in folder.record.metrics.items() if n.startswith(stage.shown or stage.measures)}
            log.info("%s", metrics_table(f"{name}: {folder.path}", shown))
    log.info("record: %s", folder.path / "record.json")
    return folder.record.as_dict()


def evaluate(config: EvaluateConfig, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Evaluates the backbone that `config.model` names and returns the record; metrics are prefixed `after/`.

    With `metrics=scan` it scores the rows of a file by a vector of that backbone; metrics are prefixed `scan/`.
    """
    check_trainer(config.trainer, config.num_threads)
    folder = _open(config, overrides)
    tracker = tracker_for(folder.path, config.logger, fresh=False) if main_process() else Trackers()
    with Session(tracker, folder.path, folder.record, config.logger) as session, folder.running():
        session.open()
        run = Run(config, folder, tracker)
        scanned = ScanFile.read(config) if config.metrics == "scan" else None
        backbone = scanned.backbone() if scanned else run.backbone
        began = time.monotonic()
        folder.record.wall_seconds = {}  # of an earlier evaluation
        module = run.inference_module(backbone, scanned.vector if scanned else None)
        if scanned:
            launch(config.trainer)
            run.note_data("scan", scanned.examples)
            folder.record.model = backbone.settings.name or UNKNOWN
            folder.record.behavior = vector_info(scanned.vector).get("behavior") or UNKNOWN
            result = EvaluationResult(scanned.scan(module, folder.path), [])
            if main_process():
                log.info("the rows and what they mean: %s", scan_page.write(folder.path))
        elif config.metrics == "lm_eval":  # the harness works in one process
            from secvec.evaluation.lm_eval import lm_eval_metrics  # an optional package, and slow to import

            module.configure_model()
            model = module.model.to(device_of(config.trainer))
            result = EvaluationResult(lm_eval_metrics(model, backbone.tokenizer, config), [])
        else:
            run.data.check(())
            run.data.fit_to(backbone.tokenizer, backbone.context, ["infer"])
            run.evaluator().check(module, leaks=True)
            launch(config.trainer)
            result = run.evaluate(module, "after", leaks=True)
        folder.record.metrics = {}  # of an earlier evaluation, which may have measured more
        run.save_results(result)
        folder.record.wall_seconds["evaluate"] = round(time.monotonic() - began, 3)
        folder.record.processes["evaluate"] = run.processes
        folder.record.backbone = _weights(backbone)
    log.info("%s", metrics_table(f"{backbone.folder}", result.metrics))
    log.info("record: %s", folder.path / "record.json")
    return folder.record.as_dict()


def _peak_bytes() -> dict[str, int]:
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"host": host} | ({"gpu": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})


def _plan(config: RunConfig) -> dict[str, Any]:
    """Prints the plan, and removes the empty folder that Hydra made for the run."""
    log.info("%s", plan(config))
    for folder in (Path(config.run_dir), Path(config.run_dir).parent):
        with suppress(OSError):
            folder.rmdir()  # only if empty
    return {}


def _open(config: AnyConfig, overrides: Sequence[str]) -> RunFolder:
    record = Record(
        key=config.key,
        stage=getattr(config, "stage", "evaluate"),
        behavior=config.behavior.name,
        model=config.model.name or UNKNOWN,
        seed=config.seed,
        generation=backend_info(config.generation, config.trainer),
        overrides=list(overrides),
        config=config.model_dump(mode="json", exclude={"key"}),
    )
    if isinstance(config, RunConfig):
        record.defense, record.tune, record.needs = config.defense.name, config.tune.kind, list(config.defense.needs)
    prepare_cache(config.paths.cache)
    _quiet()
    if not main_process():
        logging.getLogger("secvec").setLevel(logging.ERROR)
    return RunFolder(Path(config.run_dir), record, replay_yaml(config.composed) if config.composed else "")


def _weights(backbone: Backbone) -> Weights:
    return Weights(folder=str(backbone.folder), fingerprint=backbone.fingerprint)


def _quiet() -> None:
    """Leaves the screen to our own tables and bars; warnings stay."""
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)
