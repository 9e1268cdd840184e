"""A moving average of weights: theta' <- m theta' + (1 - m) theta, in place, in few launches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

GATHER = 64  # parameters gathered at a time under ZeRO stage 3


def cosine_momentum(start: float, progress: float) -> float:
    """Momentum that rises from `start` to 1 by half a cosine as `progress` goes from 0 to 1 (LUT; BYOL)."""
    return 1 + 0.5 * (start - 1) * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def update_average(student: nn.Module, average: nn.Module, momentum: float) -> None:
    """Move `average`, which has the student's structure and fp32 weights, by one step.

    Parameters that are not trained are equal and stay; floating-point buffers (running statistics) move too.
    Collective under ZeRO stage 3, where the student's parameters are gathered to be read.
    """
    pairs = zip(student.parameters(), average.parameters(), strict=True)
    ours, theirs = map(list, zip(*((s, a) for s, a in pairs if s.requires_grad), strict=True))
    partitioned = any(hasattr(parameter, "ds_id") for parameter in ours)
    for start in range(0, len(ours), GATHER):
        chunk, targets = ours[start : start + GATHER], theirs[start : start + GATHER]
        if partitioned:
            import deepspeed

            with deepspeed.zero.GatheredParameters(chunk):  # to be read only; written to, the change would be lost
                move(targets, chunk, momentum)
        else:
            move(targets, chunk, momentum)
    buffers = zip(student.buffers(), average.buffers(), strict=True)
    statistics = [(s, a) for s, a in buffers if a.is_floating_point()]
    if statistics:
        sources, targets = map(list, zip(*statistics, strict=True))
        move(targets, sources, momentum)


def move(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    """Each target by (1 - momentum) of its way to its source, which may have fewer bits: a few launches for all."""
    sources = [source.detach() for source in sources]
    if any(source.dtype != target.dtype for source, target in zip(sources, targets, strict=True)):
        wide = [torch.empty_like(target) for target in targets]
        torch._foreach_copy_(wide, sources)
        sources = wide
    torch._foreach_lerp_(targets, sources, 1 - momentum)
