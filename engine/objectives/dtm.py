"""DTM: predict a frozen teacher's tokens from a masked image, compared in groups of alike tokens (arXiv 2401.00254).

The groups come from the teacher's tokens; how many tokens they merge and in how many steps is drawn anew for every 128
images of every step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from engine.models.beit import MaskedBeit, initialize_beit, truncated_normal
from engine.morphing import group_tokens, morphed_loss
from engine.objectives.contract import Objective
from engine.teachers import Teacher
from recipes.methods import Dtm
from recipes.schema import Model
from shards.block_masks import BlockMasks
from shards.loader import Batch
from shards.mask_draws import MaskDraws
from shards.philox import Stream, words


class Draw(NamedTuple):
    """One grouping: about so many tokens are removed, in so many steps."""

    removed: int
    num_steps: int


class DynamicTokenMorphing(Objective):
    """BEiT on the masked image, one linear head on every patch token, distance to the teacher's group means."""

    view = "pretrain_dtm"
    no_decay = frozenset({"cls_token", "pos_embed"})  # the mask token and position tables do decay

    def __init__(self, settings: Dtm, model: Model, image_size: int, *, teacher: Teacher, seed: int) -> None:
        super().__init__()
        self.settings, self.seed = settings, seed
        grid = image_size // model.patch_size
        blocks = BlockMasks(grid=grid, num_masked=settings.num_masked, min_area=settings.min_block)
        self.masks = MaskDraws(blocks=blocks)
        self.keep_outside("teacher", teacher, moves=False)
        self.encoder = MaskedBeit(model, image_size)
        self.mask_token = nn.Parameter(torch.empty(1, 1, model.embed_dim))
        self.head = nn.Linear(model.embed_dim, teacher.width)
        truncated_normal(self.mask_token)
        initialize_beit(self.head)

    @property
    def teacher(self) -> Teacher:
        return self.outside["teacher"]

    def facts(self) -> dict[str, str]:
        return {"teacher": self.teacher.identity}

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        images = batch.views[0]
        blocks = batch.positions // self.settings.images_per_draw
        targets = self.teacher(images)  # [B, N, T]
        predictions = self.predict(images, batch.mask)
        return self.compare(predictions, targets, blocks, step)

    def predict(self, images: Tensor, mask: Tensor | None) -> Tensor:
        """Predicted features [B, N, T] of all patches of images [B, 3, S, S]; `mask` bool [B, N] hides some of them."""
        return self.head(self.encoder(images, mask, self.mask_token)[:, 1:])

    def compare(self, predictions: Tensor, targets: Tensor, blocks: Tensor, step: int) -> dict[str, Tensor]:
        """Loss and mean number of groups, in fp32; images of one block (int64 [B] on the CPU) share their draws.

        Blocks are cut from the global batch, so that neither rank nor micro-batch changes what an image gives.
        """
        dtype = torch.promote_types(predictions.dtype, torch.float32)
        numbers, counts = (values.tolist() for values in blocks.unique_consecutive(return_counts=True))
        loss, num_groups = torch.zeros((), dtype=dtype, device=predictions.device), 0.0
        with torch.autocast(predictions.device.type, enabled=False):
            parts = predictions.to(dtype).split(counts), targets.to(dtype).split(counts)
            for block, count, part, part_targets in zip(numbers, counts, *parts, strict=True):
                block_loss, block_groups = self.compare_block(part, part_targets, block, step)
                loss = loss + block_loss * (count / len(blocks))
                num_groups += block_groups * (count / len(blocks))
        return {"loss": loss, "groups": torch.full_like(loss, num_groups, requires_grad=False)}

    def compare_block(self, predictions: Tensor, targets: Tensor, block: int, step: int) -> tuple[Tensor, float]:
        """Mean loss and mean number of groups over the groupings of images [b, N, T] that share them."""
        settings, losses, num_groups = self.settings, [], 0.0
        draws = self.draws(block, step, targets.shape[1])
        for draw in draws:
            groups = group_tokens(targets, draw.removed, draw.num_steps)
            losses.append(
                morphed_loss(
                    predictions,
                    targets,
                    groups,
                    kind=settings.loss,
                    beta=settings.beta,
                    normalize_target=settings.normalize_target,
                )
            )
            num_groups += groups.sizes.shape[1] / len(draws)
        return torch.stack(losses).mean(), num_groups

    def draws(self, block: int, step: int, num_tokens: int) -> list[Draw]:
        """The groupings of a block of the global batch: functions of (seed, step, block), uniform in their ranges."""
        settings = self.settings
        most = num_tokens if settings.max_removed is None else min(settings.max_removed, num_tokens)
        count = settings.num_schedules
        drawn = words(self.seed, step, np.array([block]), Stream.MORPH, 2 * count)[0].astype(np.uint64)
        removed = drawn[:count] * np.uint64(most + 1) >> np.uint64(32)  # 0 ... most
        steps = drawn[count:] * np.uint64(settings.max_steps) >> np.uint64(32)  # 0 ... max_steps - 1
        return [Draw(int(m), 1 + int(k)) for m, k in zip(removed, steps, strict=True)]
