"""The goldens' weights in our modules, through the importers that users go through."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from engine.objectives.contract import Objective
from engine.teachers import load_clip
from engine.weights.files import State
from engine.weights.initial import open_source, place
from engine.weights.released import recognise


def place_whole(objective: Objective, weights: State, average: State | None = None) -> None:
    """Load a released checkpoint, its moving average beside it, as `init=FILE` does; all of it must be used."""
    content = {"model": weights} if average is None else {"model": weights, "model_ema": average}
    with TemporaryDirectory() as folder:
        file = Path(folder) / "released.pth"
        torch.save(content, file)
        placement = place(objective, open_source(str(file)))
    assert not placement.fresh and not placement.unused, str(placement)
    assert bool(placement.averaged) == (average is not None)


def own_names(weights: State, others: State) -> State:
    """`others`, which have names like those of a released checkpoint's `weights`, under our names."""
    layout = recognise(weights)
    assert layout is not None, f"no layout is known that begins with {list(weights)[:3]}"
    return layout.translate(others)


def place_clip(network: nn.Module, weights: State, what: str) -> None:
    """Load CLIP's image tower, as `teacher=FILE` does."""
    load_clip(network, weights, f"teacher={what}")
