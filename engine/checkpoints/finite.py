"""Numbers that are none: a checkpoint with NaN or infinity in it is worse than no checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def first_not_finite(state: object) -> str | None:
    """Where in a tree of dicts and lists the first tensor with NaN or infinity stands; None where all are finite."""
    for place, tensor in tensors_of(state):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return place
    return None


def tensors_of(state: object, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a tree with its place, `key.key.0`."""
    if isinstance(state, Tensor):
        yield place, state
    elif isinstance(state, Mapping):
        for key, value in state.items():
            yield from tensors_of(value, f"{place}.{key}" if place else str(key))
    elif isinstance(state, (list, tuple)):
        for number, value in enumerate(state):
            yield from tensors_of(value, f"{place}.{number}" if place else str(number))


def file_problem(path: Path) -> str | None:
    """Why the tensors of a checkpoint's file are of no use, or None.

    DeepSpeed's are pickles: verify them first.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        elif path.suffix == ".pt":
            state = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
        else:
            return None
    except (ImportError, AttributeError):  # of another version of DeepSpeed; whoever loads it will say so
        return None
    except (OSError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        return f"cannot be opened ({str(error).splitlines()[0]})"
    place = first_not_finite(state)
    return f"{place} is not finite" if place is not None else None
