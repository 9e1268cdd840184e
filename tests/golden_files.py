"""Where the golden numbers lie, how one file is read, and a count of what of it was compared.

A file holds inputs and what the released programs made of them. A check takes the inputs and compares what it
recognises; what it left lying, or a file of which it compared nothing, is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SAMPLES = Path(__file__).parent / "golden"
GOLDEN = Path(os.environ.get("GOLDEN_DIR", SAMPLES))

# Inputs and weights are exact in fp32, so fp64 agrees to about 1e-10; what the files store in fp32 to 1e-6.
RTOL, ATOL = 1e-9, 1e-10
STORED_RTOL, STORED_ATOL = 1e-6, 1e-8
FP32_TOL = 2e-5  # between two programs in fp32


def read(name: str) -> dict[str, np.ndarray]:
    """The arrays of a sample, for tests that need some weights."""
    return load(SAMPLES / name)


def state(golden: dict[str, np.ndarray], prefix: str) -> dict[str, Tensor]:
    """The arrays whose names begin with `prefix`, as float64 tensors."""
    chosen = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    return {key: torch.from_numpy(value.copy()).double() for key, value in chosen.items()}


def load(path: Path) -> dict[str, Any]:
    """The arrays of an npz, or the leaves of a json by their path: `small/shapes/cls_token`."""
    if path.suffix == ".json":
        return dict(leaves(json.loads(path.read_text())))
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def leaves(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{key}/")
        else:
            yield above + key, value


class Golden:
    """The content of one file, by key; every key must be taken, compared or said to mean nothing here."""

    def __init__(self, path: Path, content: dict[str, Any] | None = None) -> None:
        """`content` replaces what is in the file."""
        self.path, self.name = path, path.stem
        self.content = load(path) if content is None else content
        self.untouched = set(self.content)
        self.compared: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self.content

    def keys(self, prefix: str = "") -> list[str]:
        return [key for key in self.content if key.startswith(prefix)]

    def take(self, key: str, default: Any = None) -> Any:
        """An input; `default` where the file has none, AssertionError where there is no default either."""
        assert key in self.content or default is not None, f"{self.name}: has no {key}"
        self.untouched.discard(key)
        return self.content.get(key, default)

    def tensor(self, key: str) -> Tensor:
        """An input as a tensor, floating-point ones in fp64."""
        value = torch.from_numpy(np.array(self.take(key)))
        return value.double() if value.is_floating_point() else value

    def state(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with `prefix`, without it."""
        return {key.removeprefix(prefix): self.tensor(key) for key in self.keys(prefix)}

    def config(self) -> dict[str, Any]:
        """`cfg` where it is JSON; empty where there is none."""
        return json.loads(str(self.take("cfg"))) if "cfg" in self else {}

    def leave(self, *keys: str) -> None:
        """These say something about the file, nothing that could be computed."""
        self.untouched.difference_update(keys)

    def close(self, key: str, actual: Any, rtol: float | None = None, atol: float | None = None) -> None:
        """Compare, if the file has the key; the tolerances are those of the precision it is stored in."""
        if key not in self:
            return
        expected, actual = np.asarray(self.content[key]), array(actual)
        stored = expected.dtype == np.float32
        rtol = rtol if rtol is not None else (STORED_RTOL if stored else RTOL)
        atol = atol if atol is not None else (STORED_ATOL if stored else ATOL)
        assert expected.shape == actual.shape, f"{self.name}: {key}: {actual.shape} here, {expected.shape} there"
        np.testing.assert_allclose(
            actual, expected, rtol=rtol, atol=atol, equal_nan=False, err_msg=f"{self.name}: {key}"
        )
        self.count(key)

    def same(self, key: str, actual: Any) -> None:
        """Compare exactly, if the file has the key."""
        if key not in self:
            return
        expected, actual = np.asarray(self.content[key]), array(actual)
        assert expected.shape == actual.shape, f"{self.name}: {key}: {actual.shape} here, {expected.shape} there"
        np.testing.assert_array_equal(actual, expected, err_msg=f"{self.name}: {key}")
        self.count(key)

    def count(self, key: str) -> None:
        """This key was compared."""
        self.untouched.discard(key)
        self.compared.append(key)

    def finish(self) -> None:
        """AssertionError where a key was not understood or nothing was compared."""
        assert not self.untouched, f"{self.name}: nothing is known of {', '.join(sorted(self.untouched))}"
        assert self.compared, f"{self.name}: nothing in it was compared"


def array(values: Any) -> np.ndarray:
    return values.detach().numpy() if isinstance(values, Tensor) else np.asarray(values)
