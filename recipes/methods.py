"""The knobs of each method: MAE, LUT, DTM. Their sources stand beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.checks import require


@dataclass(frozen=True, kw_only=True)
class Mae:
    """Masked autoencoder (He et al., 2021, arXiv 2111.06377): predict the pixels of the masked patches."""

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


@dataclass(frozen=True, kw_only=True)
class Dtm:
    """Dynamic token morphing (Kim et al., 2025, arXiv 2401.00254): a frozen teacher's tokens, compared in groups.

    Every patch is seen; the masked ones through a mask token. Sources: docs/methods.md.
    """

    num_masked: int = 75  # patches of 196 that the block-wise mask hides
    min_block: int = 16  # patches; the smallest area that is drawn for a block of the mask
    num_schedules: int = 2  # groupings drawn side by side; the loss is their mean
    max_removed: int | None = None  # a grouping removes 0 ... max_removed tokens; none: all N; 0: token by token
    max_steps: int = 14  # in 1 ... max_steps steps
    images_per_draw: int = 128  # neighbours in the global batch that share their draws (one GPU's, in the paper)
    loss: Literal["smooth_l1", "l1", "l2", "negcosine"] = "smooth_l1"  # distance of two group means
    beta: float = 2.0  # smooth_l1: where the parabola becomes a line
    normalize_target: bool = False  # targets with mean 0 and variance 1 over their channels
    teacher_norm: Literal["student", "clip"] = "student"  # the teacher's input: normalised as the student's, or as CLIP

    def __post_init__(self) -> None:
        require(self.num_masked >= 0, f"objective.num_masked={self.num_masked}: 0 or more patches are needed")
        require(self.min_block >= 1, f"objective.min_block={self.min_block}: at least 1 patch is needed")
        require(
            self.num_schedules >= 1 and self.max_steps >= 1,
            f"objective.num_schedules={self.num_schedules}, objective.max_steps={self.max_steps}: at least 1 is needed",
        )
        require(
            self.max_removed is None or self.max_removed >= 0,
            f"objective.max_removed={self.max_removed}: 0 or more tokens are needed (or none)",
        )
        require(self.images_per_draw >= 1, f"objective.images_per_draw={self.images_per_draw}: at least 1 is needed")
        require(self.beta > 0, f"objective.beta={self.beta}: must be positive")


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


Objective = Mae | Lut | Dtm

ARCHITECTURE_OF = {Mae: "vit", Lut: "vit", Dtm: "beit"}  # methods that train one architecture only
