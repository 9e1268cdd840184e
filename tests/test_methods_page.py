"""docs/methods.md names every knob of every method, no knob that does not exist, and every recipe of the ablations."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from recipes import registry
from recipes.overrides import leaves

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "methods.md").read_text()
PATHS = {path: name for name in registry.recipes() for path in leaves(registry.load(name))}
OBJECTIVES = {type(registry.load(name).objective) for name in registry.recipes()}


@pytest.mark.parametrize("method", sorted(OBJECTIVES, key=lambda method: method.__name__))
def test_every_setting_of_a_method_is_described(method):
    missing = [field.name for field in dataclasses.fields(method) if f"`objective.{field.name}`" not in PAGE]
    assert not missing


def test_every_field_that_the_page_names_exists():
    named = set(re.findall(r"`((?:objective|model|data|optim)\.[a-z_0-9]+)", PAGE))
    assert named and not named - PATHS.keys()


def test_every_recipe_of_the_ablations_is_on_the_page():
    variants = {name for name in registry.recipes() if name.count("_") > 2 and "demo" not in name}
    assert variants and not {name for name in variants if f"`{name}`" not in PAGE}
