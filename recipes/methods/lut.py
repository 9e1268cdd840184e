"""The knobs of LUT."""

from __future__ import annotations

from dataclasses import dataclass

from recipes.checks import require
from recipes.methods.mae import Mae
from recipes.sections.data import Data
from recipes.sections.model import Model


@dataclass(frozen=True, kw_only=True)
class Lut(Mae):
    """Learning with unmasked tokens (Kim et al., 2024, arXiv 2310.13593): MAE and broader contextualisation.

    Sources: docs/methods.md.
    """

    w_mae: float = 1.0  # weight of the reconstruction
    w_bc: float = 0.25  # weight of the contextual loss: 1.0 for ViT-S, 0.25 for ViT-B
    momentum: float = 0.996  # of the moving average at the start; rises to 1 by half a cosine
    head_depth: int = 2  # linear layers of the projector; 0: none
    predictor_depth: int = 2  # linear layers of the predictor; 0: none
    head_hidden: int = 4096  # width between them
    norm_batch: int = 1024  # images that batch norm saw at once in the paper: micro-batch x ranks

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum <= 1, f"objective.momentum={self.momentum}: a number from 0 to 1 is needed")
        require(
            self.w_mae >= 0 and self.w_bc >= 0,
            f"objective.w_mae={self.w_mae}, objective.w_bc={self.w_bc}: weights must not be negative",
        )
        require(
            min(self.head_depth, self.predictor_depth) >= 0 and self.head_hidden >= 1,
            f"objective.head_depth={self.head_depth}, objective.predictor_depth={self.predictor_depth}, "
            f"objective.head_hidden={self.head_hidden}: depths of 0 or more and a width of 1 or more are needed",
        )

    def check(self, model: Model, data: Data, precision: str) -> None:
        super().check(model, data, precision)
        require(
            precision in ("fp32", "bf16"),
            f"precision={precision}: a moving average of 16-bit weights loses part of every step; "
            "set precision=bf16 (autocast over fp32 weights) or fp32",
        )
