"""What a batch carries for the mask: noise, from which the model makes it, or the mask itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.draws.augmentations import Draws, mask_noise
from shards.draws.block_masks import BlockMasks


@dataclass(frozen=True)
class MaskDraws:
    """Uniform noise per patch, a block-wise mask, both or neither. Both are functions of (seed, epoch, sample id)."""

    num_noise: int = 0  # uniform numbers per sample; the first ones are the same, however many are drawn
    blocks: BlockMasks | None = None

    def drawn(self, seed: int, epoch: int, ids: np.ndarray) -> Draws:
        """`noise` float32 [B, num_noise] in [0, 1) and `mask` bool [B, N], True = masked; N = 0 without `blocks`."""
        no_mask = np.zeros((len(ids), 0), bool)
        return {
            "noise": mask_noise(seed, epoch, ids, self.num_noise),
            "mask": self.blocks.masks(seed, epoch, ids) if self.blocks else no_mask,
        }


NO_MASK = MaskDraws()
