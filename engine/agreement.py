"""What all ranks must see alike: one rank's value on all, every rank's value on all; and waiting for each other."""

from __future__ import annotations

import torch.distributed as dist

from engine.runtime import Runtime


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
