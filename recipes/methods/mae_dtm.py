"""The knobs of DTM on an MAE host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recipes.methods.mae import Mae, num_kept
from recipes.methods.morphing import Morphing
from recipes.sections.data import Data
from recipes.sections.model import Model


@dataclass(frozen=True, kw_only=True)
class MaeDtm(Morphing):
    """MAE (arXiv 2111.06377) whose decoder predicts a frozen teacher's tokens instead of pixels, compared as in DTM.

    Only the visible patches go through the encoder; the decoder says something of all of them.
    """

    architecture: ClassVar[str] = "vit"

    mask_ratio: float = 0.75  # share of patches hidden from the encoder
    decoder_embed_dim: int = 512
    decoder_depth: int = 8
    decoder_num_heads: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.host()  # MAE refuses what it cannot do

    def host(self) -> Mae:
        """What of these settings is MAE's."""
        names = ("mask_ratio", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
        return Mae(**{name: getattr(self, name) for name in names})

    def num_hidden(self, num_patches: int) -> int:
        return num_patches - num_kept(num_patches, self.mask_ratio)

    def check(self, model: Model, data: Data, precision: str) -> None:
        self.host().check(model, data, precision)
        super().check(model, data, precision)
