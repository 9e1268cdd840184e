"""Where the golden numbers lie, and how one file is read."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))


def read(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name, allow_pickle=False) as file:
        return dict(file)


def state(golden: dict[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    """The arrays whose names begin with `prefix`, as float64 tensors."""
    chosen = {key.removeprefix(prefix): value for key, value in golden.items() if key.startswith(prefix)}
    return {key: torch.from_numpy(value.copy()).double() for key, value in chosen.items()}
