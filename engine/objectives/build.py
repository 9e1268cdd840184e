"""From a recipe to its objective."""

from __future__ import annotations

from engine.objectives.contract import Objective
from engine.objectives.dtm import DynamicTokenMorphing
from engine.objectives.lut import ContextualAutoencoder
from engine.objectives.mae import MaskedAutoencoder
from engine.objectives.mae_dtm import MorphedAutoencoder
from engine.teachers import open_teacher
from recipes.methods import Dtm, Lut, Mae, MaeDtm
from recipes.schema import Recipe


def build_objective(recipe: Recipe) -> Objective:
    """The recipe's objective with fresh weights from torch's current seed."""
    return BUILDERS[type(recipe.objective)](recipe)


def build_mae(recipe: Recipe) -> MaskedAutoencoder:
    return MaskedAutoencoder(recipe.objective, recipe.model, recipe.data.image_size)


def build_lut(recipe: Recipe) -> ContextualAutoencoder:
    return ContextualAutoencoder(recipe.objective, recipe.model, recipe.data.image_size)


def build_dtm(recipe: Recipe) -> DynamicTokenMorphing:
    return DynamicTokenMorphing(recipe.objective, recipe.model, recipe.data.image_size, **comparison(recipe))


def build_mae_dtm(recipe: Recipe) -> MorphedAutoencoder:
    return MorphedAutoencoder(recipe.objective, recipe.model, recipe.data.image_size, **comparison(recipe))


def comparison(recipe: Recipe) -> dict:
    """What is compared with; the teacher is opened by it, ValueError where it cannot be."""
    return dict(teacher=open_teacher(recipe), seed=recipe.run.seed)


BUILDERS = {Mae: build_mae, Lut: build_lut, Dtm: build_dtm, MaeDtm: build_mae_dtm}
