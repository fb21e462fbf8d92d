"""The data of a run: drawn, checked, tokenised and served to the stages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, Sampler

from secvec.data.batch import Encoded, collate
from secvec.data.draw import check_disjoint, draw_benign, draw_benign_lots
from secvec.data.encode import encode
from secvec.data.example import Example
from secvec.data.prompts import loader, question
from secvec.data.tokens import encoded
from secvec.errors import ConfigError, DataError
from secvec.settings.schema import EvaluationSettings, FinetuneSettings

if TYPE_CHECKING:
    from secvec.behaviors.base import Behavior
    from secvec.config.schema import AnyConfig, DataSettings, VectorSettings
    from secvec.models.backbone import Backbone
    from secvec.module import SecVecModule

log = logging.getLogger(__name__)

Streams = Sequence[tuple[Sequence[Encoded], int]]
"""Streams of rows, each with its rows per global batch."""


class GlobalBatchSampler(Sampler[list[int]]):
    """Global batches out of several streams of rows, of which this process gets every `world`-th row.

    An epoch is one pass over the first stream, its shuffled rows split into ceil(n / batch_size) batches of equal size
    (to within one): every row once, no small last batch. The other streams go round and round, `batch_sizes[k]` rows a
    batch. Row indices count through the streams one after another. Lightning's own sampler would shuffle again per
    device; with this one 1 and N processes see the same global batches.
    """

    def __init__(self, sizes: Sequence[int], batch_sizes: Sequence[int], seed: int, rank: int = 0, world: int = 1):
        if min(sizes) < 1 or sizes[0] // ceil(sizes[0] / batch_sizes[0]) < world:
            raise ConfigError(
                f"{sizes[0]} rows in batches of {batch_sizes[0]} leave one of {world} processes without a row: "
                f"use a larger batch_size, more rows, or fewer devices"
            )
        self.sizes, self.batch_sizes, self.seed, self.rank, self.world = sizes, batch_sizes, seed, rank, world
        self.epoch = 0
        self.sampler = self  # where Lightning looks for set_epoch

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch, also after a resume."""
        self.epoch = epoch

    def __len__(self) -> int:
        return ceil(self.sizes[0] / self.batch_sizes[0])

    def __iter__(self) -> Iterator[list[int]]:
        main = torch.tensor_split(self._permutation(0, self.epoch), len(self))
        for step, rows in enumerate(main):
            batch = rows.tolist()
            offset = self.sizes[0]
            for stream in range(1, len(self.sizes)):
                batch += [offset + i for i in self._round(stream, self.epoch * len(self) + step)]
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


def training_loader(streams: Streams, seed: int, rank: int = 0, world: int = 1) -> DataLoader:
    """The training batches of one process. The rows of all streams but the first are marked as rows of the KL term."""
    rows = [(row, number > 0) for number, (stream, _) in enumerate(streams) for row in stream]
    sizes, batch_sizes = [len(stream) for stream, _ in streams], [size for _, size in streams]
    sampler = GlobalBatchSampler(sizes, batch_sizes, seed, rank, world)
    return DataLoader(rows, batch_sampler=sampler, collate_fn=collate)  # type: ignore[arg-type]


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
        self.cycle = 0
        """Which of the mixtures the finetune stage trains on."""

    @classmethod
    def of(cls, config: AnyConfig) -> SecVecDataModule:
        """All data of a run; nothing is drawn yet. `evaluate.py` has test prompts alone."""
        vector, finetune = getattr(config, "vector", None), getattr(config, "finetune", None)
        samples: Any = (config.data, vector, finetune, config.evaluation)
        return cls(config.behavior, *samples, seed=config.seed, cache=config.paths.cache)  # type: ignore[misc]

    @cached_property
    def vector_samples(self) -> dict[str, list[Example]]:
        """The undesired samples of the vector, and the benign ones of the KL term: none where it has no weight."""
        settings = self.vector
        undesired = list(self._vector_behavior.examples(settings.split, settings.num_samples, self.seed))
        num_kl = settings.num_kl if settings.kl_weight > 0 else 0
        benign = draw_benign(self.data.streams, "vector", num_kl, self.seed, self.data.stream_weights)
        return {"undesired": undesired, "kl": benign}

    @cached_property
    def held_out(self) -> list[Example]:
        """Undesired samples for the gate of the vector."""
        return self._vector_behavior.examples("validation", self.vector.gate.num_prompts, self.seed)

    @cached_property
    def mixtures(self) -> list[dict[str, list[Example]]]:
        """The samples of each cycle, by kind; those of a cycle do not depend on how many follow."""
        n = self.finetune.cycles
        harmful, benign = self.data.counts
        undesired = self.behavior.examples("finetune", harmful * n, self.seed)
        others = draw_benign_lots(self.data.streams, "finetune", benign, self.seed, self.data.stream_weights, n)
        return [
            {"undesired": undesired[harmful * i : harmful * (i + 1)], "benign": lot} for i, lot in enumerate(others)
        ]

    @cached_property
    def tests(self) -> dict[str, list[Example]]:
        """`evaluation.num_prompts` held-out examples of each kind; the same for every stage and defense of a seed."""
        n = self.evaluation.num_prompts
        tests = {"undesired": self.behavior.examples("test", n, self.seed)}
        for kind in ("task", "ordinary"):
            if streams := [stream for stream in self.data.streams if stream.kind == kind]:
                tests[kind] = draw_benign(streams, "test", n, self.seed)
        if look_alikes := self.behavior.look_alikes(n, self.seed):
            tests["look_alike"] = look_alikes
        return tests

    def validation(self, n: int) -> dict[str, list[Example]]:
        """`n` held-out examples of kinds undesired and task; a kind without a validation split is left out."""
        tasks = [stream for stream in self.data.streams if stream.kind == "task"]
        sources: dict[str, Callable[[], list[Example]]] = {
            "undesired": lambda: self.behavior.examples("validation", n, self.seed),
            "task": lambda: draw_benign(tasks, "validation", n, self.seed) if tasks else [],
        }
        found = {}
        for kind, draw in sources.items():
            try:
                found[kind] = draw()
            except DataError as error:
                log.info("no validation on %s samples: %s", kind, error)
        return {kind: examples for kind, examples in found.items() if examples}

    def check_disjoint(self, trained: Iterable[Example]) -> None:
        """Raises DataError when a test prompt is also trained on."""
        check_disjoint(trained, [example for examples in self.tests.values() for example in examples])

    def rows(self, examples: Sequence[Example], backbone: Backbone) -> list[Encoded]:
        """Tokens of `examples` for `backbone`. Raises DataError."""
        if self.cache is None:
            return encode(examples, backbone.tokenizer, backbone.context)
        return encoded(examples, backbone.tokenizer, backbone.context, self.cache)

    def train_dataloader(self) -> DataLoader:
        """The batches of this process for the stage of the module.

        Raises ConfigError for a Trainer on several devices that would shuffle them again.
        """
        if self.trainer and self.trainer.world_size > 1 and self.trainer._accelerator_connector.use_distributed_sampler:
            raise ConfigError(
                "the batches are divided over the processes already, and Lightning would divide them again: give "
                "lightning.Trainer use_distributed_sampler=False"
            )
        module = self._module
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return training_loader(module.stage.streams(self, module), self.seed, rank, world)

    def val_dataloader(self) -> CombinedLoader | list[Any]:
        """One batch of each kind of held-out samples, by name; the same on every process."""
        n, backbone = self.evaluation.validation.num_samples, self._module.backbone
        kinds = self.validation(n) if n else {}
        loaders: dict[str, Any] = {
            kind: DataLoader(
                [(row, False) for row in self.rows(examples, backbone)],  # type: ignore[arg-type]
                batch_size=n,
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
        asked = question(examples, module.backbone.tokenizer)
        return loader(asked.batches(module, settings.batch_size, settings.max_new_tokens))

    @property
    def _vector_behavior(self) -> Behavior:
        behavior: Behavior = self.vector.behavior or self.behavior
        return behavior

    @property
    def _module(self) -> SecVecModule:
        assert self.trainer is not None, "the data module serves a Trainer"
        module: Any = self.trainer.lightning_module
        return module
