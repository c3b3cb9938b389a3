"""Communication between the training processes of a run; a single process communicates with itself."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def from_rank_zero(value: T) -> T:
    """The value that rank 0 has. A collective call, which no process leaves before rank 0 enters it."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def from_all_ranks(value: T) -> list[T]:
    """The values of all processes, in the order of their ranks. A collective call."""
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
