"""LUT and MAE in a few thousand parameters, and batches for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from engine.objectives.contract import AVERAGE
from engine.objectives.lut import ContextualAutoencoder
from recipes.methods import Lut
from recipes.schema import Model

TINY = Model(embed_dim=32, depth=2, num_heads=2, patch_size=8)
DECODER = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
NUM_PATCHES = 16


def tiny_lut(**settings: Any) -> ContextualAutoencoder:
    """A student and an average that has gone another way, statistics included."""
    torch.manual_seed(0)
    objective = ContextualAutoencoder(Lut(**{**DECODER, "head_hidden": 24, **settings}), TINY, 32)
    generator = torch.Generator().manual_seed(1)
    for value in objective.outside[AVERAGE].state_dict().values():
        if value.is_floating_point():  # stays positive where it is a variance
            value.mul_(1 + 0.2 * torch.rand(value.shape, generator=generator))
    return objective.train()


def batch_of(num_images: int = 5, num_noise: int = NUM_PATCHES, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(7)
    views = tuple(torch.randn(num_images, 3, 32, 32, generator=generator).to(dtype) for _ in range(2))
    return SimpleNamespace(views=views, noise=torch.rand(num_images, num_noise, generator=generator))


def outcome(objective: ContextualAutoencoder, batch: SimpleNamespace) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one batch."""
    loss = objective(batch, 0)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
