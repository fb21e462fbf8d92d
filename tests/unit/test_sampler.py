"""Global batches: the same rows at every step, whatever the number of processes."""

from __future__ import annotations

from itertools import combinations
from math import ceil
from types import SimpleNamespace

import lightning as L
import pytest

from secvec.data.batch import Encoded
from secvec.data.datamodule import GlobalBatchSampler, SecVecDataModule, training_loader
from secvec.errors import ConfigError

SIZES, BATCHES = (23, 7), (5, 3)


def epochs(
    rank: int = 0, world: int = 1, n: int = 3, seed: int = 0, sizes=SIZES, batches=BATCHES
) -> list[list[list[int]]]:
    """`n` epochs of the batches of one process."""
    sampler = GlobalBatchSampler(sizes, batches, seed, rank, world)
    found = []
    for epoch in range(n):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
        assert len(found[-1]) == len(sampler)
    return found


def of_stream(batch: list[int], stream: int) -> list[int]:
    return [row for row in batch if (row >= SIZES[0]) == bool(stream)]


@pytest.mark.parametrize(("size", "batch"), [(23, 5), (20, 5), (3, 5), (1, 1), (17, 16)])
def test_each_row_of_the_first_stream_once_per_epoch_in_batches_of_nearly_equal_size(size: int, batch: int) -> None:
    for epoch in epochs(sizes=(size,), batches=(batch,)):
        assert sorted(row for rows in epoch for row in rows) == list(range(size))
        lengths = [len(rows) for rows in epoch]
        assert len(lengths) == ceil(size / batch) and max(lengths) <= batch and max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_processes_together_hold_the_global_batch_of_every_step(world: int) -> None:
    alone = epochs()
    shared = [epochs(rank, world) for rank in range(world)]
    for epoch in range(3):
        for step in range(len(alone[epoch])):
            rows = [shared[rank][epoch][step] for rank in range(world)]
            assert sorted(row for part in rows for row in part) == sorted(alone[epoch][step])
            assert max(map(len, rows)) - min(map(len, rows)) <= 1
            assert all(rows)


def test_a_process_of_several_does_not_hold_all_of_it() -> None:
    assert epochs(0, 2) != epochs(1, 2) and epochs(0, 2) != epochs()


def test_epochs_differ_and_the_seed_reproduces_them() -> None:
    of_the_first_stream = epochs(seed=4, sizes=SIZES[:1], batches=BATCHES[:1])
    assert all(a != b for a, b in combinations(of_the_first_stream, 2))
    first, second, third = epochs(seed=4)
    assert epochs(seed=4) == [first, second, third]
    assert epochs(seed=5)[0] != first


@pytest.mark.parametrize(("size", "batch"), [(7, 3), (2, 5), (6, 3)])
def test_the_second_stream_gives_every_row_before_it_repeats_one(size: int, batch: int) -> None:
    found = epochs(n=6, sizes=(SIZES[0], size), batches=(BATCHES[0], batch))
    rows = [row - SIZES[0] for epoch in found for rows in epoch for row in of_stream(rows, 1)]
    assert len(rows) == 6 * ceil(SIZES[0] / BATCHES[0]) * batch
    rounds = [rows[i : i + size] for i in range(0, len(rows) - size + 1, size)]
    assert len(rounds) > 2 and all(sorted(found) == list(range(size)) for found in rounds)
    assert size < 5 or any(found != rounds[0] for found in rounds)


def test_the_second_stream_does_not_disturb_the_first() -> None:
    with_second = [[of_stream(rows, 0) for rows in epoch] for epoch in epochs()]
    assert with_second == epochs(sizes=SIZES[:1], batches=BATCHES[:1])


def test_every_batch_has_its_share_of_the_second_stream() -> None:
    assert {len(of_stream(rows, 1)) for epoch in epochs() for rows in epoch} == {BATCHES[1]}


def test_a_fresh_sampler_at_a_later_epoch_goes_on_identically() -> None:
    sampler = GlobalBatchSampler(SIZES, BATCHES, 0, 0, 1)
    sampler.set_epoch(2)
    assert list(sampler) == epochs()[2]
    assert list(sampler) != epochs()[1]


def test_lightning_finds_set_epoch_where_it_looks_for_it() -> None:
    sampler = GlobalBatchSampler(SIZES, BATCHES, 0)
    sampler.sampler.set_epoch(1)
    assert list(sampler) == epochs()[1]


@pytest.mark.parametrize(("sizes", "batches", "world"), [((23,), (5,), 5), ((3,), (8,), 4), ((0,), (5,), 1)])
def test_processes_without_a_row_are_an_error(sizes: tuple[int, ...], batches: tuple[int, ...], world: int) -> None:
    with pytest.raises(ConfigError, match="without a row"):
        GlobalBatchSampler(sizes, batches, 0, 0, world)


def test_as_many_processes_as_rows_in_the_smallest_batch_are_none() -> None:
    assert all(len(rows) >= 1 for epoch in epochs(3, 4, sizes=(23,), batches=(5,)) for rows in epoch)


def test_the_loader_marks_the_rows_of_the_kl_term() -> None:
    rows = [Encoded([1, 2, 10 + i], 1) for i in range(6)]
    batches = list(training_loader([(rows[:4], 2), (rows[4:], 1)], seed=0))
    assert len(batches) == 2
    for batch in batches:
        assert batch["extra"].tolist() == [False, False, True]
        assert (batch["input_ids"][:2, 2] < 14).all() and batch["input_ids"][2, 2] >= 14
    alone = next(iter(training_loader([(rows[:4], 2)], seed=0)))
    assert alone["extra"].tolist() == [False, False]


def test_a_trainer_that_would_divide_the_batches_again_is_refused() -> None:
    """A user's own Trainer on several devices: Lightning replaces samplers unless it is told not to."""
    data = SecVecDataModule(None, None, None, None, None)  # type: ignore[arg-type]
    connector = SimpleNamespace(use_distributed_sampler=True)
    data.trainer = SimpleNamespace(world_size=2, _accelerator_connector=connector)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="use_distributed_sampler=False"):
        data.train_dataloader()
    assert L.Trainer(accelerator="cpu", logger=False)._accelerator_connector.use_distributed_sampler is True


def test_the_second_stream_goes_on_from_epoch_to_epoch_where_gradients_are_accumulated() -> None:
    """Four batches of three are one pass over its twelve rows, in every epoch."""
    sampler = GlobalBatchSampler([8, 12], [2, 3], 0, accumulate=2)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert sorted(i for batch in sampler for i in batch if i >= 8) == list(range(8, 20))


def test_an_epoch_that_has_ended_is_not_gone_on_with() -> None:
    """With `overfit_batches` every epoch is the first one; the one after a checkpoint at its end was empty."""
    rows = [Encoded([n, n], 1) for n in range(8)]
    first, second = (training_loader([(rows, 4)], seed=0) for _ in range(2))
    for loader in (first, second):
        loader.batch_sampler.same_every_epoch = True  # type: ignore[attr-defined, union-attr]
    whole = [batch["input_ids"].tolist() for batch in first]
    second.load_state_dict(first.state_dict())  # type: ignore[attr-defined]
    assert [batch["input_ids"].tolist() for batch in second] == whole and len(whole) == 2
