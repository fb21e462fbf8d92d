"""The data of a run: drawn, checked, tokenised and served to the stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedTokenizerBase

from secvec.data.batch import Batch, Encoded, collate, count_together
from secvec.data.draw import Asked, check_counts, check_disjoint, draw_benign, draw_benign_parts, equal_shares
from secvec.data.encode import encode
from secvec.data.example import Example, Stream
from secvec.data.jsonl import JsonlFiles
from secvec.data.lengths import Fitting
from secvec.data.prompts import loader, prompt_set
from secvec.data.tokens import encoded
from secvec.errors import ConfigError, DataError, TooFewError
from secvec.settings.schema import EvaluationSettings, FinetuneSettings
from secvec.settings.trainer import in_place_of

if TYPE_CHECKING:
    from secvec.behaviors.base import Behavior
    from secvec.config.schema import AnyConfig, DataSettings, VectorSettings
    from secvec.models.backbone import Backbone
    from secvec.module import SecVecModule

log = logging.getLogger(__name__)

TESTED = ("undesired", "task", "ordinary")
"""Kinds with held-out rows. Those of untrusted data are of the task: to be learned, as far as they are right."""

SampleSet = tuple[Mapping[str, list[Example]], int]
"""Samples by kind, and the tokens that the answers to them may take."""

Streams = Sequence[tuple[Sequence[Encoded], int]]
"""Streams of rows, each with its rows per global batch."""


class GlobalBatchSampler(Sampler[list[int]]):
    """Global batches out of several streams of rows, of which this process gets every `world`-th row.

    An epoch is one pass over the first stream, its shuffled rows split into ceil(n / batch_size) batches of equal size
    (to within one): every row once, no small last batch. The other streams go round and round, `batch_sizes[k]` rows a
    batch. Row indices count through the streams one after another. Lightning's own sampler would shuffle again per
    device; with this one 1 and N processes see the same global batches. With `accumulate` batches for an optimizer
    step, the step has the rows that one batch of that many times the size would have.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_sizes: Sequence[int],
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ):
        self.steps = ceil(sizes[0] / (batch_sizes[0] * accumulate))
        if min(sizes) < 1 or sizes[0] // self.steps // accumulate < world:
            raise ConfigError(
                f"{sizes[0]} rows in batches of {batch_sizes[0]} leave one of {world} processes without a row: "
                f"use a larger batch_size, more rows, fewer devices, or a smaller trainer.accumulate_grad_batches"
            )
        self.sizes, self.batch_sizes, self.seed, self.rank, self.world = sizes, batch_sizes, seed, rank, world
        self.accumulate = accumulate
        self.epoch = 0
        self.first = 0
        """The batch that the next pass begins with."""
        self.same_every_epoch = False
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch, also after a resume."""
        self.epoch = 0 if self.same_every_epoch else epoch

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        steps = torch.tensor_split(self._permutation(0, self.epoch), self.steps)
        parts = [part.tolist() for rows in steps for part in torch.tensor_split(rows, self.accumulate)]
        first, self.first = self.first, 0
        for number, batch in enumerate(parts[first:], first):
            offset = self.sizes[0]
            for stream in range(1, len(self.sizes)):
                batch += [offset + i for i in self._round(stream, self.epoch * len(self) + number)]
                offset += self.sizes[stream]
            yield batch[self.rank :: self.world]

    def _round(self, stream: int, step: int) -> list[int]:
        """Rows of `stream` for the `step`-th batch since the start of training."""
        size, n = self.sizes[stream], self.batch_sizes[stream]
        first = step * n
        passes = {p: self._permutation(stream, p) for p in range(first // size, (first + n - 1) // size + 1)}
        return [int(passes[i // size][i % size]) for i in range(first, first + n)]

    def _permutation(self, stream: int, number: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + stream * 10_007 + number)
        return torch.randperm(self.sizes[stream], generator=generator)


class StepLoader(DataLoader):
    """Tells each batch the tokens of its optimizer step, so that accumulated batches are weighted by their tokens.

    Its state is for checkpoints after whole steps: how many batches of which epoch were served, and torch's random
    state, which dropout draws from.
    """

    served = 0
    resumed: Mapping[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Where the training is."""
        cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
        return {"epoch": self._batches.epoch, "served": self.served, "rng": [torch.get_rng_state(), *cuda]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """The next pass goes on from there: in the same epoch, or in the next one where it had ended."""
        self.resumed = state_dict

    @property
    def _batches(self) -> GlobalBatchSampler:
        sampler: Any = self.batch_sampler
        return sampler

    def _begin(self) -> Iterator[Batch]:
        state, self.resumed = self.resumed, None
        within = state is not None and state["epoch"] == self._batches.epoch and state["served"] < len(self._batches)
        self.served = self._batches.first = state["served"] if state and within else 0
        if state and not within:
            _set_random_state(state["rng"])
        batches = super().__iter__()  # draws a number, as at the beginning of every epoch
        if state and within:
            _set_random_state(state["rng"])
        return batches

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        batches = self._begin()
        while step := list(islice(batches, self._batches.accumulate)):
            count_together(step)
            for batch in step:
                self.served += 1
                yield batch


def _set_random_state(states: Sequence[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)


def training_loader(streams: Streams, seed: int, rank: int = 0, world: int = 1, accumulate: int = 1) -> DataLoader:
    """The training batches of one process, `accumulate` of them for an optimizer step.

    The rows of all streams but the first are marked as extra.
    """
    rows = [(row, number > 0) for number, (stream, _) in enumerate(streams) for row in stream]
    sizes, batch_sizes = [len(stream) for stream, _ in streams], [size for _, size in streams]
    sampler = GlobalBatchSampler(sizes, batch_sizes, seed, rank, world, accumulate)
    return StepLoader(rows, batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]


class SecVecDataModule(L.LightningDataModule):
    """All data of a run, each sample drawn once; the stage of the module decides which of it is served.

    Args:
        behavior: the undesired behavior.
        data: the mixture: how many undesired and benign samples, and the benign streams.
        vector: the samples of the vector stage.
        finetune: batch size and cycles of the finetune stage.
        evaluation: how many held-out prompts of each kind.
        seed: of every draw and of the order of the rows.
        cache: where the tokens of large data are kept; None: nowhere.
    """

    def __init__(
        self,
        behavior: Behavior,
        data: DataSettings,
        vector: VectorSettings,
        finetune: FinetuneSettings,
        evaluation: EvaluationSettings,
        seed: int = 0,
        cache: Path | None = None,
    ):
        super().__init__()
        self.behavior, self.data, self.vector, self.finetune = behavior, data, vector, finetune
        self.evaluation, self.seed, self.cache = evaluation, seed, cache
        self._validation: dict[int | None, dict[str, list[Example]]] = {}
        self._fits: set[str] = set()
        self._reader: tuple[Any, ...] | None = None
        self.cycle = 0
        """Which of the mixtures the finetune stage trains on."""
        self.extra: list[Example] = []
        """What the finetune stage reads beside the mixture, for a defense with an `extra_batch_size`."""
        self.prepared = False
        """Whether a run has done what the defense does before a training: see `Defense.needs_run`."""

    @classmethod
    def of(cls, config: AnyConfig) -> SecVecDataModule:
        """All data of a run; nothing is drawn yet. `evaluate.py` has test prompts alone."""
        vector, finetune = getattr(config, "vector", None), getattr(config, "finetune", None)
        samples: Any = (config.data, vector, finetune, config.evaluation)
        return cls(config.behavior, *samples, seed=config.seed, cache=config.paths.cache)  # type: ignore[misc]

    @property
    def vector_behavior(self) -> Behavior:
        """The behavior that the vector is trained on."""
        return getattr(self.vector, "behavior", None) or self.behavior  # evaluate.py trains no vector

    @property
    def is_local(self) -> bool:
        """Whether all samples are on this machine."""
        sources = (self.behavior, self.vector_behavior, *self.data.streams)
        return all(getattr(source, "is_local", True) for source in sources)  # embedded ones always are

    @cached_property
    def vector_samples(self) -> dict[str, list[Example]]:
        """The undesired samples of the vector, and the benign ones of the KL term: none where it has no weight."""
        return {"undesired": self._undesired, "kl": self._kl}

    @cached_property
    def _undesired(self) -> list[Example]:
        n, of_attack = self.vector.num_samples, self.data.counts[0]
        if self.vector.of_attack and n is not None and of_attack is not None:
            n = min(n, of_attack)  # by data.harmful_ratio there are fewer than data.num_harmful
        return list(self.vector_behavior.examples(self.vector.split, n, self.seed))

    @cached_property
    def _kl(self) -> list[Example]:
        streams, weights = self.data.serving("vector")
        return draw_benign(
            streams, "vector", self.vector.num_kl if self.vector.kl_weight > 0 else 0, self.seed, weights
        )

    @cached_property
    def held_out(self) -> list[Example]:
        """Undesired samples for the gate of the vector."""
        return self.vector_behavior.examples("validation", self.vector.gate.num_prompts, self.seed)

    @cached_property
    def mixtures(self) -> list[dict[str, list[Example]]]:
        """The samples of each cycle, by kind; those of a cycle do not depend on how many follow.

        The finetune stage puts in their place what its defense makes of them.
        """
        tests = {example.key for example in self.tests["undesired"]} if self.data.untrusted else ()
        return [
            {"undesired": undesired, "benign": _untrusted_without(benign, tests, "test prompts of the behavior")}
            for undesired, benign in zip(self._harmful, self._benign, strict=True)
        ]

    @cached_property
    def _harmful(self) -> list[list[Example]]:
        """The undesired samples of each cycle."""
        n, cycles = self.data.counts[0], self.finetune.cycles
        try:
            drawn = self.behavior.examples("finetune", None if n is None else n * cycles, self.seed)
        except TooFewError as error:
            raise TooFewError(str(error), error.have // cycles) from None
        n = len(drawn) // cycles
        return [drawn[n * i : n * (i + 1)] for i in range(cycles)]

    @cached_property
    def _benign(self) -> list[list[Example]]:
        """The benign, or untrusted, samples of each cycle."""
        streams, weights = self.data.serving("finetune")
        return draw_benign_parts(streams, "finetune", self.data.counts[1], self.seed, weights, self.finetune.cycles)

    @cached_property
    def tests(self) -> dict[str, list[Example]]:
        """`evaluation.num_prompts` held-out examples of each kind; the same for every stage and defense of a seed."""
        tests = {kind: self._test(kind) for kind in TESTED}
        look_alikes = self.behavior.look_alikes(len(tests["undesired"]), self.seed)
        return {kind: examples for kind, examples in (tests | {"look_alike": look_alikes}).items() if examples}

    def _test(self, kind: str) -> list[Example]:
        split = self.evaluation.split
        if kind == "undesired":
            return self.behavior.examples(split, self.evaluation.num_prompts, self.seed)
        kinds = (kind, "untrusted") if kind == "task" else (kind,)
        streams = {name: stream for name, stream in self.data.benign.items() if stream.kind in kinds}
        names, n = list(streams) if len(streams) > 1 else [], self.evaluation.num_prompts
        examples = draw_benign([*streams.values()], split, n, self.seed, names=names) if streams else []
        if not self.data.untrusted:
            return examples
        trusted = (self.behavior, self.vector_behavior, *self.data.serving("vector")[0])
        known = {row.key for files in trusted if isinstance(files, JsonlFiles) for row in files.all_rows()}
        return _untrusted_without(examples, known, "prompts of the behavior's and the benign rows")

    def validation(self, n: int | None) -> dict[str, list[Example]]:
        """At most `n` held-out examples of kinds undesired and task; a kind without a validation split is left out."""
        if n == 0:
            return {}
        if n not in self._validation:
            tasks = [stream for stream in self.data.streams if stream.kind == "task"]
            shares = equal_shares(n, len(tasks))
            kinds = {
                "undesired": _at_most(n, lambda k: self.behavior.examples("validation", k, self.seed)),
                "task": [
                    example
                    for stream, share in zip(tasks, shares, strict=True)
                    for example in _at_most(share, partial(self._of_stream, stream))
                ],
            }
            self._validation[n] = {kind: found for kind, found in kinds.items() if found}
        return self._validation[n]

    def _of_stream(self, stream: Stream, n: int | None) -> list[Example]:
        return draw_benign([stream], "validation", n, self.seed)

    def check(self, stages: Collection[str]) -> None:
        """Draws all samples of `stages` and of the tests, before anything is trained.

        Raises one error for all that is wrong: ConfigError for counts that the data do not meet, each with the number
        that would do, and DataError for rows that cannot be read, and for test prompts that are trained on.
        """
        num, (harmful, benign), vector = self.evaluation.num_prompts, self.data.counts, self.vector
        asked: dict[str, Callable[[], list[Asked]]] = {
            "vector": lambda: [
                ("vector.num_samples", vector.num_samples, lambda: self._undesired),
                ("vector.num_kl", vector.num_kl, lambda: self._kl),
                ("vector.gate.num_prompts", vector.gate.num_prompts, lambda: self.held_out),
            ],
            "finetune": lambda: [
                ("data.num_harmful", harmful, lambda: self._harmful),
                ("data.num_benign", benign, lambda: self._benign),
            ],
        }
        tests: list[Asked] = [("evaluation.num_prompts", num, partial(self._test, kind)) for kind in TESTED]
        check_counts([*tests, *(one for stage in stages for one in asked.get(stage, list)())])

        def of_the_vector() -> list[Example]:
            check_disjoint(self._undesired, self.held_out, "prompts of the vector's gate (validation)")
            gate = self.held_out if self.evaluation.split == "test" else []  # else they are the tests
            return [*self._undesired, *self._kl, *gate]

        trained: dict[str, Callable[[], list[Example]]] = {
            "vector": of_the_vector,
            "finetune": lambda: [example for mixture in self.mixtures for some in mixture.values() for example in some],
        }
        tested = [example for examples in self.tests.values() for example in examples]
        for stage in stages:
            check_disjoint(trained.get(stage, list)(), tested)

    def fit_to(self, tokenizer: PreTrainedTokenizerBase, context: int, stages: Collection[str]) -> None:
        """Applies `data.too_long` to the samples of `stages`, those of `infer` being the tests. Raises DataError."""
        self._fits.update(stages)
        settings, room = self.evaluation.validation, self.evaluation.max_new_tokens
        losses: list[SampleSet] = [(self.validation(settings.num_samples), 0)]
        answers: list[SampleSet] = [(self.validation(settings.num_prompts), room)] if settings.every_n_steps else []
        sets: dict[str, Callable[[], list[SampleSet]]] = {
            "vector": lambda: [(self.vector_samples, 0), ({"gate": self.held_out}, room), *losses],
            "finetune": lambda: [*((mixture, 0) for mixture in self.mixtures), *losses, *answers],
            "infer": lambda: [(self.tests, room)],
        }
        fitting = Fitting(partial(self._encoded, tokenizer), context, self.data.too_long)
        for kinds, space in [one for stage in stages for one in sets[stage]()]:
            for kind, examples in kinds.items():
                kept = fitting.fit(examples, space)
                if examples and not kept and self.data.too_long != "error":
                    raise DataError(
                        f"no {kind} sample fits into the model's context; first: {fitting.faults[-len(examples)]}"
                    )
                examples[:] = kept
        fitting.check()

    def rows(self, examples: Sequence[Example], backbone: Backbone) -> list[Encoded]:
        """Tokens of `examples` for `backbone`. Raises DataError."""
        return self._encoded(backbone.tokenizer, examples, backbone.context)

    def _encoded(self, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], context: int) -> list[Encoded]:
        if self.cache is None:
            return encode(examples, tokenizer, context)
        return encoded(examples, tokenizer, context, self.cache)

    def setup(self, stage: str) -> None:
        """Called by the Trainer: the samples of the module's stage are made to fit into its model."""
        backbone, name = self._module.backbone, self._module.stage.name
        for callback in self.trainer.callbacks:  # type: ignore[union-attr]
            if instead := in_place_of(callback):
                raise ConfigError(f"{type(callback).__name__}: {instead}")
        reader = (backbone.context, len(backbone.tokenizer), backbone.tokenizer.chat_template)
        if self._reader not in (None, reader) and not self.prepared:
            self._draw_again()  # for another model other samples are too long
        self._reader = reader
        if name not in self._fits:
            self.fit_to(backbone.tokenizer, backbone.context, [name])

    def _draw_again(self) -> None:
        for name, value in vars(SecVecDataModule).items():
            if isinstance(value, cached_property):
                vars(self).pop(name, None)
        self._validation.clear()
        self._fits.clear()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leaves batches on the host: see `Batch`."""
        return batch

    def train_dataloader(self) -> DataLoader:
        """The batches of this process for the stage of the module.

        Raises ConfigError for a Trainer on several devices that would shuffle them again, and for one that makes a step
        of fewer batches than they know of.
        """
        if self.trainer and self.trainer.world_size > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
            raise ConfigError(
                "the batches are divided over the processes already, and Lightning would divide them again: give "
                "lightning.Trainer use_distributed_sampler=False"
            )
        module, runner = self._module, self.trainer
        share = (runner.global_rank, runner.world_size, runner.accumulate_grad_batches) if runner else (0, 1, 1)
        batches = training_loader(module.stage.streams(self, module), self.seed, *share)
        if runner:
            _check_accumulation(runner, len(batches))
            sampler: Any = batches.batch_sampler
            sampler.same_every_epoch = bool(runner.overfit_batches)  # type: ignore[attr-defined]  # as Lightning promises
        return batches

    def val_dataloader(self) -> CombinedLoader | list[Any]:
        """One batch of each kind of held-out samples, by name; the same on every process."""
        kinds, backbone = self.validation(self.evaluation.validation.num_samples), self._module.backbone
        loaders: dict[str, Any] = {
            kind: DataLoader(
                [(row, False) for row in self.rows(examples, backbone)],  # type: ignore[arg-type]
                batch_size=len(examples),
                collate_fn=collate,
                generator=torch.Generator(),
            )
            for kind, examples in kinds.items()
        }
        return CombinedLoader(loaders, "max_size") if loaders else []

    def predict_dataloader(self) -> DataLoader:
        """The held-out prompts of all kinds in batches, for `Trainer.predict` with `stage="infer"`."""
        module, settings = self._module, self.evaluation
        examples = [example for kind in self.tests.values() for example in kind]
        asked = prompt_set(examples, module.backbone.tokenizer)
        return loader(asked.batches(module, settings.batch_size, settings.max_new_tokens))

    @property
    def _module(self) -> SecVecModule:
        assert self.trainer is not None, "the data module serves a Trainer"
        module: Any = self.trainer.lightning_module
        return module


def limited(num_batches: int, limit: int | float) -> int:
    """How many of an epoch's batches Lightning reads by `limit_train_batches`: a number, or a share."""
    return min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)


def _check_accumulation(trainer: L.Trainer, num_batches: int) -> None:
    """Raises ConfigError where a step would have other batches than the `accumulate_grad_batches` of the Trainer."""
    limit, parts = trainer.limit_train_batches, trainer.accumulate_grad_batches
    read = limited(num_batches, limit)
    if read % parts and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ConfigError(
            f"limit_train_batches={limit} leaves {read} batches, and a step has accumulate_grad_batches={parts}: the "
            f"last step would be too small. Give a multiple of {parts}"
        )


def _at_most(n: int | None, draw: Callable[[int | None], list[Example]]) -> list[Example]:
    try:
        return draw(n)
    except TooFewError as error:
        log.info("validation has fewer samples: %s", error)
        return draw(error.have) if error.have else []


def _untrusted_without(examples: list[Example], keys: Collection[Any], what: str) -> list[Example]:
    """`examples` without the untrusted ones whose prompts are in `keys`: they stay what they are known to be."""
    kept = [example for example in examples if example.kind != "untrusted" or example.key not in keys]
    if len(kept) < len(examples):
        log.info("%d of %d untrusted rows are left out: they have %s", len(examples) - len(kept), len(examples), what)
    return kept
