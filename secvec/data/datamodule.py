"""Batches that do not depend on the number of processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from math import ceil

import lightning as L
import torch
from torch.utils.data import DataLoader, Sampler

from secvec.data.encode import Encoded, collate
from secvec.errors import ConfigError


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


class SecVecDataModule(L.LightningDataModule):
    """Training rows for one stage: the main stream and, in the vector stage, the stream of the KL term."""

    def __init__(
        self, rows: Sequence[Encoded], batch_size: int, seed: int, pad_id: int,
        kl_rows: Sequence[Encoded] = (), kl_batch_size: int = 0,
    ):  # fmt: skip
        super().__init__()
        self.rows = [(row, False) for row in rows] + [(row, True) for row in kl_rows]
        self.sizes = [len(rows)] + ([len(kl_rows)] if kl_rows else [])
        self.batch_sizes = [batch_size] + ([kl_batch_size] if kl_rows else [])
        self.seed, self.pad_id = seed, pad_id

    def train_dataloader(self) -> DataLoader:
        """Batches of this process."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = GlobalBatchSampler(self.sizes, self.batch_sizes, self.seed, rank, world)
        return DataLoader(self.rows, batch_sampler=sampler, collate_fn=partial(collate, pad_id=self.pad_id))  # type: ignore[arg-type]
