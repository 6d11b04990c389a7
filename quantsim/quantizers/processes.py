"""Work that several processes share: each does its part, and all of them know what all of them found."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def world_size() -> int:
    """How many processes there are; 1 where ``torch.distributed`` was not started."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def on_every_process(compute: Callable[[], T], error: Callable[[str], Exception]) -> list[T]:
    """What ``compute()`` gives on each process, by rank; every process calls this, and gets the same list.

    An error on one process is an error on all, so that none waits for one that has given up: that process raises its own,
    the others raise ``error(message)``, which names it.

    Args:
        compute: its result is pickled where there is more than one process; tensors in it must be on the CPU.
        error: makes an exception of a message.
    """
    if world_size() == 1:
        return [compute()]
    outcomes: list[tuple[T | None, str]] = [(None, "")] * world_size()
    try:
        result = compute()
    except Exception as raised:
        dist.all_gather_object(outcomes, (None, str(raised) or type(raised).__name__))
        raise
    dist.all_gather_object(outcomes, (result, ""))
    for rank, (_, message) in enumerate(outcomes):
        if message:
            raise error(f"process {rank} of {world_size()}: {message}")
    return [found for found, _ in outcomes]  # type: ignore[misc]
