"""Initial weights of MAE and LUT (docs/methods.md)."""

from __future__ import annotations

import math

from torch import nn

TOKEN_STD = 0.02  # class and mask tokens


def initialize(module: nn.Module) -> None:
    """Xavier-uniform linear layers with zero bias, LayerNorm 1 and 0; for `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        # The patch projection is a linear layer on flattened patches, so its fans are those of the matrix; its bias
        # keeps torch's default for convolutions.
        nn.init.xavier_uniform_(module.weight.view(module.out_channels, -1))
        fan_in = module.weight[0].numel()
        nn.init.uniform_(module.bias, -1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
