"""What all ranks must see alike: one rank's value on all, every rank's value on all; waiting, and failing together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from engine.runtime import Runtime

T = TypeVar("T")


class RankFailure(OSError):
    """What one or several ranks could not do; raised on all ranks alike."""


def shared(value, runtime: Runtime):
    """Rank 0's value on every rank."""
    if runtime.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gathered(value, runtime: Runtime) -> list:
    """Every rank's value, in the order of the ranks, on every rank."""
    if runtime.world_size == 1:
        return [value]
    values = [None] * runtime.world_size
    dist.all_gather_object(values, value)
    return values


def barrier(runtime: Runtime) -> None:
    if runtime.world_size > 1:
        dist.barrier()


def together(work: Callable[[], T], runtime: Runtime) -> list[T]:
    """`work()` of every rank, in the order of the ranks, on every rank. Collective.

    RankFailure on all ranks, naming those that failed, where any raised OSError: a rank that met a full disk alone must
    not leave the others waiting for it. `work` holds no collective.
    """
    value = problem = None
    try:
        value = work()
    except OSError as error:
        problem = str(error)
    answers = gathered((value, problem), runtime)
    where = "rank {}: " if runtime.world_size > 1 else ""
    problems = [where.format(rank) + problem for rank, (_, problem) in enumerate(answers) if problem is not None]
    if problems:
        raise RankFailure("; ".join(problems))
    return [value for value, _ in answers]


def together_on_main(work: Callable[[], T], runtime: Runtime) -> T:
    """Rank 0's `work()` on every rank; RankFailure on all ranks where it raised OSError. Collective."""
    return together(work if runtime.is_main else lambda: None, runtime)[0]
