"""What an image becomes for a method: one entry here is all that a new augmentation needs.

A view is three functions of the same name: its draws (shards/draws/augmentations.py), what DALI does with them
(graphs.py), and the same in PIL (reference.py). A graph may return several images of one decode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from nvidia.dali.data_node import DataNode

from recipes.schema import Data
from shards.augment import graphs, reference
from shards.dataset import Dataset
from shards.draws import augmentations as draws


@dataclass(frozen=True)
class View:
    """The three sides of an augmentation; all return their parts in the same order."""

    draw: Callable[[Data, int, int, np.ndarray, np.ndarray, np.ndarray], draws.Draws]
    graph: Callable[[DataNode, graphs.Nodes, Data, bool], tuple[DataNode, ...]]
    reference: Callable[[bytes, draws.Draws, Data], tuple[np.ndarray, ...]]

    def drawn(self, dataset: Dataset, data: Data, seed: int, epoch: int, ids: np.ndarray) -> draws.Draws:
        """The draws of these samples, one row each."""
        return self.draw(data, seed, epoch, ids, dataset.height[ids], dataset.width[ids])

    def referenced(
        self, dataset: Dataset, data: Data, seed: int, epoch: int, ids: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """The images of these samples by way of PIL: float32 [B, 3, S, S] each."""
        drawn = self.drawn(dataset, data, seed, epoch, ids)
        rows = [
            self.reference(reference.read_image(dataset, sample_id), {name: c[row] for name, c in drawn.items()}, data)
            for row, sample_id in enumerate(ids)
        ]
        return tuple(np.stack(images) for images in zip(*rows, strict=True))


VIEWS = {
    "pretrain_mae": View(draws.pretrain_mae, graphs.pretrain_mae, reference.pretrain_mae),
    "pretrain_lut": View(draws.pretrain_lut, graphs.pretrain_lut, reference.pretrain_lut),
    "pretrain_dtm": View(draws.pretrain_dtm, graphs.pretrain_dtm, reference.pretrain_dtm),
    "evaluate": View(draws.evaluate, graphs.evaluate, reference.evaluate),
}


def find_view(name: str) -> View:
    """The view of that name; ValueError listing the names there are."""
    if name not in VIEWS:
        raise ValueError(f"view={name}: not known; choose one of {', '.join(VIEWS)}")
    return VIEWS[name]
