"""A student and a teacher of DTM in a few thousand parameters, and batches for them."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from engine.objectives.dtm import DynamicTokenMorphing
from engine.objectives.mae_dtm import MorphedAutoencoder
from engine.teachers import Teacher
from recipes.methods import Dtm, MaeDtm
from recipes.schema import Model

# isort: split
from timm.layers import PatchEmbed

TINY = Model(architecture="beit", embed_dim=32, depth=2, num_heads=4, patch_size=8, init_values=0.1)
TINY_VIT = Model(embed_dim=32, depth=2, num_heads=4, patch_size=8)
TINY_DECODER = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)


class Widen(nn.Module):
    """A teacher of a few numbers: a linear map of every patch."""

    num_prefix_tokens, num_features, num_classes = 1, 16, 0

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(32, 8, 3, 16)
        self.head = nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        patches = self.patch_embed(images)
        return torch.cat([patches[:, :1], patches], dim=1)


def tiny(settings: Dtm | None = None, seed: int = 0, model: Model = TINY) -> DynamicTokenMorphing:
    torch.manual_seed(seed)
    teacher = Teacher(Widen(), torch.float32)
    return DynamicTokenMorphing(settings or Dtm(num_masked=6), model, 32, teacher=teacher, seed=seed)


def tiny_mae(settings: MaeDtm | None = None, seed: int = 0) -> MorphedAutoencoder:
    torch.manual_seed(seed)
    teacher = Teacher(Widen(), torch.float32)
    return MorphedAutoencoder(settings or MaeDtm(**TINY_DECODER), TINY_VIT, 32, teacher=teacher, seed=seed)


def batch_of(num_images: int, first: int = 0) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(num_images, 3, 32, 32, generator=generator)
    noise = torch.rand(num_images, 16, generator=generator)
    positions = torch.arange(first, first + num_images)
    return SimpleNamespace(views=(images,), mask=noise.argsort(1) < 6, noise=noise, positions=positions)


def part_of(batch: SimpleNamespace, rows: slice) -> SimpleNamespace:
    parts = {name: getattr(batch, name)[rows] for name in ("mask", "noise", "positions")}
    return SimpleNamespace(views=(batch.views[0][rows],), **parts)
