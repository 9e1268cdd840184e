"""What the pipelines of a loader share: the data, the view, its draws, and where they run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recipes.schema import Data
from shards.augment.views import View
from shards.dataset import Dataset
from shards.draws.augmentations import Draws
from shards.draws.masks import MaskDraws
from shards.reading.segments import MicroBatch


@dataclass(frozen=True, eq=False, kw_only=True)
class Feed:
    """All but the segment, in which the pipelines of a loader differ."""

    dataset: Dataset
    view: View
    data: Data
    seed: int
    masks: MaskDraws
    num_threads: int
    device_id: int | None = None  # the GPU; none: DALI's CPU operators
    check_sources: bool = False  # compare the source of every batch with the plan, not only of a segment's first

    def columns(self, batch: MicroBatch) -> dict[str, np.ndarray]:
        """Everything about a micro-batch but its pixels, one row per sample; columns without width are left out."""
        columns = {
            "labels": self.dataset.label[batch.ids].astype(np.int64),
            "ids": batch.ids,
            **self.masks.drawn(self.seed, batch.epoch, batch.ids),
            **self.draws(batch.epoch, batch.ids),
        }
        return {name: column for name, column in columns.items() if column.size}

    def draws(self, epoch: int, ids: np.ndarray) -> Draws:
        """What the view's graph needs besides the bytes, one row per sample."""
        return self.view.drawn(self.dataset, self.data, self.seed, epoch, ids)
