"""Recipes by name. A recipe is a function that returns a complete `Recipe`; its docstring is its documentation."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable

from recipes.schema import Recipe

RECIPE_MODULES = (
    "recipes.mae",
    "recipes.lut",
    "recipes.lut_variants",
    "recipes.dtm",
    "recipes.dtm_variants",
    "recipes.demo",
)

_registry: dict[str, Callable[[], Recipe]] = {}


def recipe(function: Callable[[], Recipe]) -> Callable[[], Recipe]:
    """Decorator: the function's name becomes the recipe's name."""
    if function.__name__ in _registry:
        raise ValueError(f"recipe {function.__name__}: defined twice; rename one of them")
    _registry[function.__name__] = function
    return function


def recipes() -> dict[str, Callable[[], Recipe]]:
    """All recipes by name, in the order of their modules."""
    for module in RECIPE_MODULES:
        importlib.import_module(module)
    return _registry


def load(name: str) -> Recipe:
    """The recipe called `name`; ValueError with the nearest name where there is none."""
    known = recipes()
    if name not in known:
        raise ValueError(f"--recipe {name}: no such recipe{nearest(name, known)}; engine/train.py --list shows all")
    return known[name]()


def summary(name: str) -> str:
    """First line of a recipe's docstring."""
    return documentation(name).partition("\n")[0]


def documentation(name: str) -> str:
    """The whole docstring of a recipe: source, command, expected result."""
    return inspect.getdoc(recipes()[name]) or ""


def by_module() -> dict[str, list[str]]:
    """Names of all recipes by the first line of their module's docstring, in order."""
    groups: dict[str, list[str]] = {}
    for name, function in recipes().items():
        title = (inspect.getdoc(inspect.getmodule(function)) or "").partition("\n")[0]
        groups.setdefault(title, []).append(name)
    return groups


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the closest of the known words, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.4)
    return f"; did you mean {close[0]}?" if close else ""
