"""Projection heads, and the batch norm over all ranks that they need."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class RankBatchNorm(nn.Module):
    """`nn.BatchNorm1d` for [B, C] over the batches of all ranks, on GPU and CPU (`SyncBatchNorm` refuses the CPU).

    Equal to batch norm on the whole batch, gradients included. Statistics are fp32, in one message per call; the sums
    are taken about the running mean, which all ranks share, to lose fewer digits in E[x^2] - E[x]^2. State-dict keys
    are those of `nn.BatchNorm1d`.

    In evaluation mode the running statistics are used, or with `eval_by_batch` those of the batch; neither moves them.
    """

    eval_by_batch = False  # a moving average set to True normalises as its student does (BYOL)

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            values = x.to(self.running_mean.dtype)
            by_batch = self.training or self.eval_by_batch
            mean, var = self.batch_statistics(values) if by_batch else (self.running_mean, self.running_var)
            return (values - mean) * torch.rsqrt(var + self.eps) * self.weight + self.bias

    def batch_statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance [C] over all ranks; in training the running ones are moved."""
        center = self.running_mean.clone()
        shifted = x - center
        sums = torch.cat([shifted.sum(0), shifted.square().sum(0), shifted.new_full((1,), len(x))])
        if dist.is_initialized() and dist.get_world_size() > 1:
            sums = all_reduce(sums)
        first, second, count = sums[: len(center)], sums[len(center) : -1], sums[-1].detach()
        offset = first / count
        var = (second / count - offset.square()).clamp_min(0)
        if self.training:
            self.track(center + offset, var * count / (count - 1).clamp_min(1))
        return center + offset, var

    @torch.no_grad()
    def track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        """Move the running statistics towards a batch's."""
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased_var, self.momentum)
        self.num_batches_tracked += 1


NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "bn": RankBatchNorm,
    "ln": partial(nn.LayerNorm, eps=1e-6),
    "none": None,
}
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


def projection_head(width: int, *, hidden: int, depth: int, norm: str = "bn", act: str = "relu") -> nn.Sequential:
    """`depth` linear layers without bias, width -> hidden -> ... -> width, a norm and an activation between them.

    `norm`: bn (over all ranks), ln (eps 1e-6) or none, which leaves no layer behind; `act`: relu or gelu. Depth 0 is
    the identity; the last layer has neither norm nor activation (LUT).
    """
    layers: list[nn.Module] = []
    make_norm = NORMS[norm]
    for index in range(depth):
        last = index == depth - 1
        layers.append(nn.Linear(width if index == 0 else hidden, width if last else hidden, bias=False))
        if not last:
            layers += [] if make_norm is None else [make_norm(hidden)]
            layers.append(ACTIVATIONS[act]())
    return nn.Sequential(*layers)
