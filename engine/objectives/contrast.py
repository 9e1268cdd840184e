"""How far predictions are from their targets: the distances that LUT's contextual loss was tried with."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def contextual_loss(prediction: Tensor, target: Tensor, *, kind: str = "l2norm", temperature: float = 0.2) -> Tensor:
    """Mean loss of the rows of `prediction` [R, D] against the same rows of `target`, both at length 1, in fp32.

    l2norm: squared distance, 2 - 2 cos (LUT); smooth_l1: smooth L1 with beta 1, summed over the channels, which is half
    of l2norm unless a channel differs by more than 1; infonce: `info_nce`. Gradients reach the prediction alone.
    """
    with torch.autocast(prediction.device.type, enabled=False):
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        ours, theirs = F.normalize(prediction.to(dtype), dim=1), F.normalize(target.detach().to(dtype), dim=1)
        if kind == "infonce":
            return info_nce(ours, theirs, temperature)
        if kind == "smooth_l1":
            return F.smooth_l1_loss(ours, theirs, reduction="none", beta=1.0).sum(dim=1).mean()
        return (ours - theirs).square().sum(dim=1).mean()


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """2 tau x cross-entropy of each query's own key among the keys of all ranks (MoCo v3, arXiv 2104.02057, Alg. 1).

    Query and key r [R, D] at length 1 belong together; every other key of every rank is a negative. The mean over ranks
    of equally many rows is the loss of the whole batch on one rank, gradients included.
    """
    everyone, first = gathered(keys)
    own = first + torch.arange(len(queries), device=queries.device)
    return 2 * temperature * F.cross_entropy(queries @ everyone.T / temperature, own)


def gathered(rows: Tensor) -> tuple[Tensor, int]:
    """The rows [R, D] of all ranks one after the other, without gradient, and where this rank's begin."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows, 0
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts), dist.get_rank() * len(rows)
