"""How a setting that cannot be is refused: one line, naming the field, the numbers and what to do."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """Raise ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)
