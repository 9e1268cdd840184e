"""The knobs of DTM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from recipes.checks import require
from recipes.methods.method import Method
from recipes.sections.data import Data
from recipes.sections.model import Model


@dataclass(frozen=True, kw_only=True)
class Dtm(Method):
    """Dynamic token morphing (Kim et al., 2025, arXiv 2401.00254): a frozen teacher's tokens, compared in groups.

    Every patch is seen; the masked ones through a mask token. Sources: docs/methods.md.
    """

    architecture: ClassVar[str] = "beit"
    has_teacher: ClassVar[bool] = True

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

    def check(self, model: Model, data: Data, precision: str) -> None:
        num_patches = model.num_patches(data.image_size)
        require(
            self.num_masked <= num_patches,
            f"objective.num_masked={self.num_masked}: an image has {num_patches} patches "
            "(data.image_size / model.patch_size, squared); choose fewer",
        )
