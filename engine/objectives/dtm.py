"""DTM: predict a frozen teacher's tokens from a masked image, compared in groups of alike tokens (arXiv 2401.00254)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.models.beit import MaskedBeit, initialize_beit, truncated_normal
from engine.objectives.comparison import MorphedComparison
from engine.teachers import Teacher
from recipes.methods import Dtm
from recipes.schema import Model
from shards.draws.block_masks import BlockMasks
from shards.draws.masks import MaskDraws
from shards.reading.loader import Batch


class DynamicTokenMorphing(MorphedComparison):
    """BEiT on the masked image, one linear head on every patch token, distance to the teacher's group means."""

    view = "pretrain_dtm"
    no_decay = frozenset({"cls_token", "pos_embed"})  # the mask token and position tables do decay

    def __init__(self, settings: Dtm, model: Model, image_size: int, *, teacher: Teacher, seed: int) -> None:
        super().__init__(settings, teacher=teacher, seed=seed)
        grid = image_size // model.patch_size
        blocks = BlockMasks(grid=grid, num_masked=settings.num_masked, min_area=settings.min_block)
        self.masks = MaskDraws(blocks=blocks)
        self.encoder = MaskedBeit(model, image_size)
        self.mask_token = nn.Parameter(torch.empty(1, 1, model.embed_dim))
        self.head = nn.Linear(model.embed_dim, teacher.width)
        truncated_normal(self.mask_token)
        initialize_beit(self.head)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images = batch.views[0]
        targets = self.teacher(images)  # [B, N, T]
        predictions = self.predict(images, batch.mask)
        return self.compare(predictions, targets, batch.positions, step, batch.mask)

    def predict(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Predicted features [B, N, T] of all patches of images [B, 3, S, S]; `mask` bool [B, N] hides some of them."""
        return self.head(self.encoder(images, mask, self.mask_token)[:, 1:])
