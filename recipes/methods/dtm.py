"""The knobs of DTM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recipes.checks import require
from recipes.methods.morphing import Morphing
from recipes.sections.data import Data
from recipes.sections.model import Model

LARGEST_GRID = 64  # patches of a side of a block-wise mask (shards/draws/block_masks.py)


@dataclass(frozen=True, kw_only=True)
class Dtm(Morphing):
    """Dynamic token morphing (Kim et al., 2025, arXiv 2401.00254): a frozen teacher's tokens, compared in groups.

    Every patch is seen; the masked ones through a mask token. Sources: docs/methods.md.
    """

    architecture: ClassVar[str] = "beit"

    num_masked: int = 75  # patches of 196 that the block-wise mask hides
    min_block: int = 16  # patches; the smallest area that is drawn for a block of the mask

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_masked >= 0, f"objective.num_masked={self.num_masked}: 0 or more patches are needed")
        require(self.min_block >= 1, f"objective.min_block={self.min_block}: at least 1 patch is needed")

    def num_hidden(self, num_patches: int) -> int:
        return self.num_masked

    def check(self, model: Model, data: Data, precision: str) -> None:
        num_patches = model.num_patches(data.image_size)
        require(
            self.num_masked <= num_patches,
            f"objective.num_masked={self.num_masked}: an image has {num_patches} patches "
            "(data.image_size / model.patch_size, squared); choose fewer",
        )
        require(
            self.min_block <= self.num_masked or not self.num_masked,
            f"objective.min_block={self.min_block}: above objective.num_masked={self.num_masked}, so that no block "
            "would ever fit; lower it",
        )
        grid = data.image_size // model.patch_size
        require(
            grid <= LARGEST_GRID,
            f"data.image_size={data.image_size}: {grid} patches of a side, block-wise masks have at most "
            f"{LARGEST_GRID}; raise model.patch_size or lower data.image_size",
        )
        super().check(model, data, precision)
