"""The knobs of token morphing, for every method that compares with a teacher in groups of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from recipes.checks import require
from recipes.methods.method import Method
from recipes.sections.data import Data
from recipes.sections.model import Model

ONLY_BIPARTITE = ("split", "protect_first", "counts", "weighting", "min_steps", "max_steps")  # k-means has no use for


@dataclass(frozen=True, kw_only=True)
class Morphing(Method):
    """A frozen teacher's tokens, compared in groups (Kim et al., 2025, arXiv 2401.00254). Sources: docs/methods.md."""

    has_teacher: ClassVar[bool] = True

    # Which groups: drawn anew at every step, a number of tokens that are merged away and a number of steps to do so.
    morphing: Literal["bipartite", "kmeans"] = "bipartite"  # step by step, or k-means with N - removed clusters
    num_schedules: int = 2  # groupings drawn side by side; the loss is their mean
    min_removed: int = 0  # a grouping removes min_removed ... max_removed tokens, uniformly
    max_removed: int | None = None  # none: all N; 0: token by token, no morphing
    min_steps: int = 1  # bipartite: in min_steps ... max_steps steps, uniformly
    max_steps: int = 14
    counts: Literal["released", "exact"] = "released"  # bipartite: ceil(removed / steps) at each, or `removed` in all
    split: Literal["parity", "random"] = "parity"  # bipartite: what divides the tokens of a step into two sets
    protect_first: bool = True  # bipartite: the first patch is never merged (the program takes it for a class token)
    weighting: Literal["size", "step"] = "size"  # bipartite: group means of all tokens, or of each step's plain means
    kmeans_iterations: int = 10  # kmeans: how often tokens are assigned to their nearest centre
    images_per_draw: int = 128  # neighbours in the global batch that share their draws (one GPU's, in the paper)

    # What is compared, and how.
    loss: Literal["smooth_l1", "l1", "l2", "negcosine"] = "smooth_l1"  # distance of two group means
    beta: float = 2.0  # smooth_l1: where the parabola becomes a line
    loss_on: Literal["all", "masked", "visible"] = "all"  # tokens whose distance counts; all weigh the same
    normalize_target: bool = False  # targets with mean 0 and variance 1 over their channels
    teacher_norm: Literal["student", "clip"] = "student"  # CLIP's input: normalised as the student's, or as CLIP was

    def __post_init__(self) -> None:
        for name in ("num_schedules", "min_steps", "kmeans_iterations", "images_per_draw"):
            value = getattr(self, name)
            require(value >= 1, f"objective.{name}={value}: at least 1 is needed")
        require(self.min_removed >= 0, f"objective.min_removed={self.min_removed}: 0 or more tokens are needed")
        require(
            self.max_removed is None or self.max_removed >= 0,
            f"objective.max_removed={self.max_removed}: 0 or more tokens are needed (or none)",
        )
        for unit in ("removed", "steps"):
            least, most = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            require(
                most is None or least <= most,
                f"objective.min_{unit}={least}: above objective.max_{unit}={most}; lower it, or raise the other",
            )
        require(self.beta > 0, f"objective.beta={self.beta}: must be positive")
        self.check_unused()

    def check_unused(self) -> None:
        """ValueError for a setting that the chosen way of morphing or the chosen distance would ignore."""
        if self.morphing == "kmeans":
            unused, because = ONLY_BIPARTITE, "objective.morphing=kmeans"
        else:
            unused, because = ("kmeans_iterations",), "objective.morphing=bipartite"
        reasons = dict.fromkeys(unused, because)
        if self.loss != "smooth_l1":
            reasons["beta"] = f"objective.loss={self.loss}"
        for name, reason in reasons.items():
            value, default = (str(getattr(owner, name)).lower() for owner in (self, type(self)))
            require(value == default, f"objective.{name}={value}: {reason} has no use for it; leave it at {default}")

    def num_hidden(self, num_patches: int) -> int:
        """How many of an image's patches the student does not see."""
        raise NotImplementedError

    def check(self, model: Model, data: Data, precision: str) -> None:
        super().check(model, data, precision)
        num_patches = model.num_patches(data.image_size)
        most = {"min_removed": self.min_removed, "max_removed": self.max_removed or 0}
        if self.morphing == "bipartite":
            most["max_steps"] = self.max_steps
        for name, value in most.items():
            require(
                value <= num_patches,
                f"objective.{name}={value}: an image has {num_patches} tokens "
                "(data.image_size / model.patch_size, squared); choose at most as many",
            )
        hidden = self.num_hidden(num_patches)
        counted = {"all": num_patches, "masked": hidden, "visible": num_patches - hidden}[self.loss_on]
        require(
            counted > 0,
            f"objective.loss_on={self.loss_on}: {hidden} of {num_patches} patches are masked, so there is nothing to "
            "compare; mask others, or set objective.loss_on=all",
        )
