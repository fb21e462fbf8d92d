"""The processes of a run: which one this is, and how they wait for and tell each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lightning_utilities.core.rank_zero import rank_zero_only

Value = TypeVar("Value")


def main_process() -> bool:
    """Whether this process is the one that writes (rank 0)."""
    return getattr(rank_zero_only, "rank", 0) == 0


def rank_and_world() -> tuple[int, int]:
    """The number of this process, and how many there are."""
    import torch.distributed as dist  # slow to import, and the report needs none of it

    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait_for_all() -> None:
    """Returns once every process is here."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


def from_first(look: Callable[[], Value]) -> Value:
    """What the first process sees, for all of them: files may change while others look. Every process must call it."""
    import torch.distributed as dist

    box = [look() if main_process() else None]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]  # type: ignore[return-value]


def gathered(items: list[Any]) -> list[Any]:
    """The items of all processes, on all of them."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return items
    parts: list[list[Any]] = [[]] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]
