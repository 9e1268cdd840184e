"""Typed overrides `section.field=value` and the way back: printing a recipe, hashing it, and comparing two.

The value is read by the field's own type: `optim.lr=1e-3`, `data.scale=0.08,1`, `run.steps=none`,
`objective.norm_pix_loss=false`. Errors are ValueErrors of one line with the nearest name.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from recipes.registry import nearest
from recipes.schema import Recipe

TRUE, FALSE, NONE = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}, {"none", "null"}


def apply_overrides(recipe: Recipe, overrides: list[str]) -> Recipe:
    """`recipe` with every `section.field=value` applied; the result is validated as a whole.

    Of a field given twice the last value counts, so that a script's overrides can be overridden.
    """
    changes: dict[str, dict[str, Any]] = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"{override}: an override has the form section.field=value")
        section, field, kind = resolve(recipe, path)
        changes.setdefault(section, {})[field] = parse(path, text, kind)
    top = changes.pop("", {})
    sections = {name: dataclasses.replace(getattr(recipe, name), **fields) for name, fields in changes.items()}
    return dataclasses.replace(recipe, **sections, **top)


def resolve(recipe: Recipe, path: str) -> tuple[str, str, Any]:
    """Section, field and type that `path` names ("" is the section of top-level fields such as precision)."""
    section, dot, field = path.partition(".")
    owner = getattr(recipe, section, None) if dot else recipe
    if dot and not (section in field_types(recipe) and dataclasses.is_dataclass(owner)):
        raise ValueError(f"{path}: no such section{nearest(path, leaves(recipe))}")
    known = field_types(owner)
    name = field if dot else section
    if name not in known or dataclasses.is_dataclass(getattr(owner, name)) or path == "departures":
        raise ValueError(f"{path}: no such field{nearest(path, leaves(recipe))}")
    return (section if dot else ""), name, known[name]


def field_types(owner: Any) -> dict[str, Any]:
    """Resolved type of every field of a dataclass instance."""
    hints = typing.get_type_hints(type(owner))
    return {f.name: hints[f.name] for f in dataclasses.fields(owner)}


def leaves(recipe: Recipe) -> dict[str, Any]:
    """All values of a recipe by their path, `departures` left out (it is a remark, not a knob)."""
    values: dict[str, Any] = {}
    for name in field_types(recipe):
        value = getattr(recipe, name)
        if dataclasses.is_dataclass(value):
            values |= {f"{name}.{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}
        elif name != "departures":
            values[name] = value
    return values


def difference(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Paths whose values differ, with both values (None where a recipe has no such field)."""
    a, b = leaves(old), leaves(new)
    return {path: (a.get(path), b.get(path)) for path in a | b if a.get(path) != b.get(path)}


def show(value: Any) -> str:
    """A value as an override would spell it; reading it back gives the same value."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, tuple):
        return ",".join(show(item) for item in value)
    return str(value)


def parse(path: str, text: str, kind: Any) -> Any:
    """`text` as a value of type `kind`; ValueError naming `path`, the text and what is accepted."""
    origin, options = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return parse_optional(path, text, options)
    if origin is Literal:
        return parse_choice(path, text, options)
    if origin is tuple:
        return parse_tuple(path, text, options)
    return parse_scalar(path, text, kind)


def parse_optional(path: str, text: str, options: tuple) -> Any:
    if text.lower() in NONE:
        return None
    (kind,) = (option for option in options if option is not type(None))
    return parse(path, text, kind)


def parse_choice(path: str, text: str, choices: tuple) -> Any:
    for choice in choices:
        if str(choice) == text:
            return choice
    accepted = ", ".join(str(choice) for choice in choices)
    raise ValueError(f"{path}={text}: one of {accepted} is needed{nearest(text, map(str, choices))}")


def parse_tuple(path: str, text: str, kinds: tuple) -> tuple:
    parts = [part.strip() for part in text.strip("()[]").split(",")]
    if len(parts) != len(kinds):
        raise ValueError(f"{path}={text}: {len(kinds)} values separated by commas are needed, got {len(parts)}")
    return tuple(parse_scalar(path, part, kind) for part, kind in zip(parts, kinds, strict=True))


def parse_scalar(path: str, text: str, kind: type) -> Any:
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in TRUE | FALSE:
            raise ValueError(f"{path}={text}: true or false is needed")
        return text.lower() in TRUE
    try:
        value = kind(text)
    except ValueError:
        expected = {int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{path}={text}: {expected} is needed") from None
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{path}={text}: a finite number is needed")
    return value
