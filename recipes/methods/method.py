"""What the settings of every method have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recipes.checks import require
from recipes.sections.data import Data
from recipes.sections.model import Model


@dataclass(frozen=True, kw_only=True)
class Method:
    """Settings of one method. A subclass says what it trains and what of the rest of a recipe it cannot do with."""

    architecture: ClassVar[str]  # of the encoder that it trains: a value of model.architecture
    num_views: ClassVar[int] = 1  # images that it makes of one sample
    has_teacher: ClassVar[bool] = False  # whether it learns from a frozen network, named by Recipe.teacher

    def check(self, model: Model, data: Data, precision: str) -> None:
        """ValueError, naming the field and both numbers, where these settings and the other sections contradict."""
        require(
            self.num_views == 2 or not data.shared_crop,
            f"data.shared_crop=true: this objective has {self.num_views} view, not 2; set it to false or choose a lut "
            "recipe",
        )
