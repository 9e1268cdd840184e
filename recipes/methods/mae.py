"""The knobs of MAE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recipes.checks import require
from recipes.methods.method import Method
from recipes.sections.data import Data
from recipes.sections.model import Model


@dataclass(frozen=True, kw_only=True)
class Mae(Method):
    """Masked autoencoder (He et al., 2021, arXiv 2111.06377): predict the pixels of the masked patches."""

    architecture: ClassVar[str] = "vit"

    mask_ratio: float = 0.75  # share of patches hidden from the encoder (section 4.1)
    norm_pix_loss: bool = True  # targets normalised per patch (Table 1d)
    decoder_embed_dim: int = 512  # Table 1b
    decoder_depth: int = 8  # Table 1a
    decoder_num_heads: int = 16

    def __post_init__(self) -> None:
        require(
            0 < self.mask_ratio < 1,
            f"objective.mask_ratio={self.mask_ratio}: a share strictly between 0 and 1 is needed",
        )
        for name, least in (("decoder_embed_dim", 1), ("decoder_depth", 0), ("decoder_num_heads", 1)):
            value = getattr(self, name)
            require(value >= least, f"objective.{name}={value}: at least {least} is needed")
        require(
            self.decoder_embed_dim % self.decoder_num_heads == 0 and self.decoder_embed_dim % 4 == 0,
            f"objective.decoder_embed_dim={self.decoder_embed_dim}: must be divisible by 4 and by "
            f"objective.decoder_num_heads={self.decoder_num_heads}",
        )

    def check(self, model: Model, data: Data, precision: str) -> None:
        super().check(model, data, precision)
        num_patches = model.num_patches(data.image_size)
        kept = num_kept(num_patches, self.mask_ratio)
        require(
            kept >= 1,
            f"objective.mask_ratio={self.mask_ratio}: leaves none of {num_patches} patches; choose a smaller share",
        )
        require(
            kept < num_patches,
            f"objective.mask_ratio={self.mask_ratio}: hides none of {num_patches} patches, so there is nothing to "
            "predict; choose a larger share",
        )


def num_kept(num_patches: int, mask_ratio: float) -> int:
    """Patches that a mask leaves: the rule of engine/masks.py."""
    return int(num_patches * (1 - mask_ratio))
