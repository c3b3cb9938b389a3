"""Communication between the training processes of a run; a single process communicates with itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from stasc.errors import UserError

PATIENCE = 90.0
"""Seconds in which another node's file must appear; NFS remembers for up to 60 that a file is not there."""

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


def wait_for(path: Path) -> None:
    """Wait until rank 0 has written a file or folder and this process sees it. A collective call.

    On another node of a network file system that takes a moment longer.

    Raises:
        UserError: This process does not come to see it.
    """
    from_rank_zero(f"{path.name} is written")
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{path} is written, and process {rank()} does not see it: run_dir must lie on a file system "
                "that all nodes share."
            )
        time.sleep(0.2)
        if path.parent.is_dir():
            any(path.parent.iterdir())  # has NFS ask the server what is there
