"""From a recipe to its objective."""

from __future__ import annotations

from engine.objectives.contract import Objective
from engine.objectives.mae import MaskedAutoencoder
from recipes.schema import Mae, Recipe

OBJECTIVES = {Mae: MaskedAutoencoder}


def build_objective(recipe: Recipe) -> Objective:
    """The recipe's objective with fresh weights from torch's current seed."""
    return OBJECTIVES[type(recipe.objective)](recipe.objective, recipe.model, recipe.data.image_size)
