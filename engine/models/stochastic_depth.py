"""Stochastic depth whose rate is a tensor: as a number it would be part of a compiled graph, one for every block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.models import vision_library  # noqa: F401  timm imports only after it

# isort: split
from timm.layers import DropPath


class StochasticDepth(nn.Module):
    """timm's `DropPath`, its draws included: in training an image loses a branch with probability `drop_prob`."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.register_buffer("keep_prob", torch.tensor(1 - drop_prob, dtype=torch.float64), persistent=False)

    def _apply(self, fn, recurse: bool = True):
        """To another device, but to no other type: a rounded rate would leave out other branches."""
        self.keep_prob = self.keep_prob.to(fn(self.keep_prob).device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = x.new_empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(self.keep_prob)
        return x * kept.div_(self.keep_prob)


def with_tensor_rates(blocks: nn.Module) -> None:
    """Exchange timm's modules in these blocks; branches that are never left out stay as they are."""
    for block in blocks:
        for name in ("drop_path1", "drop_path2"):
            if isinstance(branch := getattr(block, name), DropPath):
                setattr(block, name, StochasticDepth(branch.drop_prob))
