"""The encoder that a run trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.checks import require


@dataclass(frozen=True, kw_only=True)
class Model:
    """The encoder: a Vision Transformer under timm's names, of one of two architectures.

    vit: fixed sine-cosine positions (MAE, LUT). beit: learned positions of up to three kinds, added up, and a learned
    scale of every branch (DTM).
    """

    architecture: Literal["vit", "beit"] = "vit"
    embed_dim: int  # channels of a token
    depth: int  # transformer blocks
    num_heads: int
    patch_size: int = 16  # pixels
    mlp_ratio: float = 4.0
    drop_path: float = 0.0  # stochastic depth of the last block; grows linearly from 0
    init_values: float | None = None  # beit: what the scale of a branch begins with; none: branches are not scaled
    rel_pos_bias: bool = True  # beit: attention biased by relative position, a table per block
    shared_rel_pos_bias: bool = True  # beit: likewise, by one table that all blocks share
    abs_pos_emb: bool = False  # beit: learned positions, added to the patches' and the class token's embeddings

    def __post_init__(self) -> None:
        for name in ("embed_dim", "depth", "num_heads", "patch_size"):
            value = getattr(self, name)
            require(value >= 1, f"model.{name}={value}: at least 1 is needed")
        require(
            self.embed_dim % self.num_heads == 0,
            f"model.num_heads={self.num_heads}: does not divide model.embed_dim={self.embed_dim}; "
            "choose a number of heads that divides the width",
        )
        require(
            self.embed_dim % 4 == 0,
            f"model.embed_dim={self.embed_dim}: the 2-D sin-cos position table needs a multiple of 4",
        )
        require(self.mlp_ratio > 0, f"model.mlp_ratio={self.mlp_ratio}: must be positive")
        require(0 <= self.drop_path < 1, f"model.drop_path={self.drop_path}: a probability in [0, 1) is needed")
        require(
            self.init_values is None or (self.architecture == "beit" and self.init_values > 0),
            f"model.init_values={self.init_values}: must be positive (or none); only model.architecture=beit has it",
        )
        self.check_positions()

    def check_positions(self) -> None:
        kinds = {name: getattr(self, name) for name in ("rel_pos_bias", "shared_rel_pos_bias", "abs_pos_emb")}
        for name, value in kinds.items():
            require(
                self.architecture == "beit" or value == getattr(type(self), name),
                f"model.{name}={str(value).lower()}: only model.architecture=beit has it, and this is "
                f"{self.architecture}; leave it at {str(not value).lower()}",
            )
        given = ", ".join(f"model.{name}=false" for name in kinds)
        require(any(kinds.values()), f"{given}: the encoder could not tell where a patch is; set one of them to true")

    def num_patches(self, image_size: int) -> int:
        """Patches N of an image of `image_size` x `image_size` pixels."""
        return (image_size // self.patch_size) ** 2
