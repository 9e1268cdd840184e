"""The layers of DESIGN hold, nothing imports in a circle, and no module hides one of Python's or a dependency's."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("recipes", "shards", "engine", "tools")
MAY_IMPORT = {
    "recipes": {"recipes"},
    "shards": {"shards", "recipes"},
    "engine": {"engine", "shards", "recipes"},
    "tools": {"tools", "engine", "shards", "recipes"},
}
# Inside engine: pure mathematics, networks, objectives, then what uses them; the systems side knows no method.
MATHEMATICS = {"engine.clustering", "engine.fixed_morphing", "engine.masks", "engine.morphing", "engine.schedules"}
METHODS = ("engine.objectives", "engine.models", "engine.masks")
SYSTEMS = {
    "engine.agreement",
    "engine.runtime",
    "engine.signals",
    "engine.launcher_watch",
    "engine.compiling",
    "engine.zero",
    "engine.console",
    "engine.params",
    "engine.shell",
}
DEPENDENCIES = {"torch", "timm", "numpy", "rich", "deepspeed", "nvidia", "webdataset", "PIL", "safetensors", "pytest"}
BANNED = {"utils", "misc", "common", "helpers"}


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """Modules of ours that a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name in MODULES}


def external(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {name.split(".")[0] for name in names} - set(PACKAGES)


def test_the_walk_finds_the_project():
    assert {"recipes.schema", "shards.reading.loader", "engine.train", "tools.make_shards"} <= MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_layers(module):
    allowed = MAY_IMPORT[module.split(".")[0]]
    for imported in imports(MODULES[module]):
        assert imported.split(".")[0] in allowed, f"{module} must not import {imported}"


def test_recipes_need_only_the_standard_library():
    for module, path in MODULES.items():
        if module.startswith("recipes"):
            assert external(path) <= sys.stdlib_module_names, module


def test_no_cycles():
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above, module])
        if module not in done:
            for imported in imports(MODULES[module]) - {module}:
                if not module.startswith(f"{imported}."):  # a package's __init__ is imported by its members
                    visit(imported, (*above, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_mathematics_is_below_everything():
    for module in MATHEMATICS:
        assert not imports(MODULES[module]) - MATHEMATICS, module


def test_systems_know_no_method():
    for module in SYSTEMS:
        known = {name for name in imports(MODULES[module]) if name.startswith(METHODS)}
        assert not known, f"{module} imports {known}"


def test_no_objective_knows_the_loop():
    for module, path in MODULES.items():
        if module.startswith(("engine.objectives", "engine.models")):
            assert "engine.train" not in imports(path)
            assert not imports(path) & SYSTEMS, module


def test_no_module_hides_another():
    """`python engine/train.py` puts engine/ first on the path: a file there must not be called like a library."""
    taken = sys.stdlib_module_names | DEPENDENCIES
    for module in MODULES:
        name = module.split(".")[-1]
        assert name not in taken | BANNED, module


def test_packaging_lists_every_package():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(listed) == {module for module, path in MODULES.items() if path.name == "__init__.py"}


def test_files_are_not_too_long():
    for module, path in MODULES.items():
        assert len(path.read_text().splitlines()) <= 320, module
