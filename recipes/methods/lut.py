"""The knobs of LUT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from recipes.checks import require
from recipes.methods.mae import Mae, num_kept
from recipes.sections.data import Data
from recipes.sections.model import Model


@dataclass(frozen=True, kw_only=True)
class Lut(Mae):
    """Learning with unmasked tokens (Kim et al., 2024, arXiv 2310.13593): MAE and broader contextualisation.

    Sources: docs/methods.md. What the paper's ablations exchange is published without definitions and not in its
    program; the definitions are ours.
    """

    num_views: ClassVar[int] = 2

    w_mae: float = 1.0  # weight of the reconstruction
    w_bc: float = 0.25  # weight of the contextual loss: 1.0 for ViT-S, 0.25 for ViT-B
    symmetric: bool = True  # both views predict each other; false: the masked clean view predicts the full strong one
    # What is compared: means of the patch tokens, class tokens, every kept patch with the teacher's at the same place,
    # the first and the third added up, or the mean of what is decoded in the masked places with the teacher's mean.
    bc_tokens: Literal["pooled", "cls", "tokenwise", "pooled_tokenwise", "masked"] = "pooled"
    bc_loss: Literal["l2norm", "infonce", "smooth_l1"] = "l2norm"  # of two vectors at length 1; l2norm: 2 - 2 cos
    bc_temperature: float = 0.2  # infonce: its tau; keys are the micro-batches of all ranks (MoCo v3)
    momentum: float = 0.996  # of the moving average at the start; rises to 1 by half a cosine
    teacher_mask_ratio: float = 0.0  # share of patches hidden from the moving average, by noise of its own
    teacher_bn: Literal["running", "batch"] = "running"  # its batch norm: averaged statistics, or its batch's (BYOL)
    head_depth: int = 2  # linear layers of the projector; 0: none
    predictor_depth: int = 2  # linear layers of the predictor; 0: none
    head_hidden: int = 4096  # width between them
    head_norm: Literal["bn", "ln", "none"] = "bn"  # between them: batch norm over all ranks, or LayerNorm (eps 1e-6)
    head_act: Literal["relu", "gelu"] = "relu"  # after the norm
    norm_batch: int = 1024  # images that batch norm saw at once in the paper: micro-batch x ranks

    @property
    def has_batch_norm(self) -> bool:
        """Whether projector or predictor see the rest of the batch."""
        return self.head_norm == "bn" and max(self.head_depth, self.predictor_depth) >= 2

    @property
    def teacher_has_batch_norm(self) -> bool:
        return self.head_norm == "bn" and self.head_depth >= 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum <= 1, f"objective.momentum={self.momentum}: a number from 0 to 1 is needed")
        require(
            self.w_mae >= 0 and self.w_bc >= 0 and self.w_mae + self.w_bc > 0,
            f"objective.w_mae={self.w_mae}, objective.w_bc={self.w_bc}: weights must not be negative, nor both 0",
        )
        require(self.bc_temperature > 0, f"objective.bc_temperature={self.bc_temperature}: must be positive")
        require(
            0 <= self.teacher_mask_ratio < 1,
            f"objective.teacher_mask_ratio={self.teacher_mask_ratio}: a share in [0, 1) is needed (0: off)",
        )
        require(self.norm_batch >= 1, f"objective.norm_batch={self.norm_batch}: at least 1 image is needed")
        require(
            min(self.head_depth, self.predictor_depth) >= 0 and self.head_hidden >= 1,
            f"objective.head_depth={self.head_depth}, objective.predictor_depth={self.predictor_depth}, "
            f"objective.head_hidden={self.head_hidden}: depths of 0 or more and a width of 1 or more are needed",
        )
        self.check_heads()
        self.check_comparison()

    def check_heads(self) -> None:
        """Settings of layers that are not there would be ignored in silence."""
        depths = f"objective.head_depth={self.head_depth}, objective.predictor_depth={self.predictor_depth}"
        for name in ("head_norm", "head_act"):
            value = getattr(self, name)
            require(
                value == getattr(Lut, name) or max(self.head_depth, self.predictor_depth) >= 2,
                f"objective.{name}={value}: stands between linear layers, and with {depths} there is no between; "
                f"set one depth to 2 or more, or leave objective.{name} as it is",
            )
        require(
            self.teacher_bn == "running" or self.teacher_has_batch_norm,
            f"objective.teacher_bn={self.teacher_bn}: the projector has no batch norm (objective.head_norm="
            f"{self.head_norm}, objective.head_depth={self.head_depth}); set bn and 2 or more, or teacher_bn=running",
        )

    def check_comparison(self) -> None:
        tokenwise = "tokenwise" in self.bc_tokens
        require(
            not (tokenwise and self.teacher_mask_ratio),
            f"objective.teacher_mask_ratio={self.teacher_mask_ratio}: hides tokens from the teacher that "
            f"objective.bc_tokens={self.bc_tokens} compares; set the ratio to 0, or bc_tokens=pooled or cls",
        )
        require(
            self.bc_temperature == Lut.bc_temperature or self.bc_loss == "infonce",
            f"objective.bc_temperature={self.bc_temperature}: objective.bc_loss={self.bc_loss} has none; set "
            f"bc_loss=infonce, or leave it at {Lut.bc_temperature}",
        )
        require(
            not (self.bc_tokens == "masked" and self.teacher_has_batch_norm and self.teacher_bn == "running"),
            "objective.bc_tokens=masked: the student's projector sees decoded tokens, the teacher's encoded ones, and "
            "objective.teacher_bn=running has the wrong tokens' statistics; set teacher_bn=batch or head_norm=ln",
        )

    def check(self, model: Model, data: Data, precision: str) -> None:
        super().check(model, data, precision)
        num_patches = model.num_patches(data.image_size)
        require(
            num_kept(num_patches, self.teacher_mask_ratio) >= 1,
            f"objective.teacher_mask_ratio={self.teacher_mask_ratio}: leaves none of {num_patches} patches; "
            "choose a smaller share",
        )
        require(
            "tokenwise" not in self.bc_tokens or data.shared_crop,
            f"objective.bc_tokens={self.bc_tokens}: with data.shared_crop=false the same place is another part of the "
            "image in each view; set data.shared_crop=true",
        )
        require(
            precision in ("fp32", "bf16"),
            f"precision={precision}: a moving average of 16-bit weights loses part of every step; "
            "set precision=bf16 (autocast over fp32 weights) or fp32",
        )
