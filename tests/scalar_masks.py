"""Block-wise masks written out try by try: what the batches of shards/draws/block_masks.py are held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from shards.draws.block_masks import BlockMasks
from shards.draws.philox import Stream, words


class Placing(NamedTuple):
    """A mask while it is made."""

    mask: np.ndarray  # bool [grid, grid]
    gains: list[int]  # cells that each rectangle added


def place(law: BlockMasks, uniform: Callable[[float, float], float], randint: Callable[[int, int], int]) -> Placing:
    """The rectangles of one mask, one try after the other."""
    mask, gains = np.zeros((law.grid, law.grid), bool), []
    while sum(gains) < law.num_masked:
        most, gain = min(law.num_masked - sum(gains), law.max_area or law.num_masked), 0
        for _ in range(10):
            area = uniform(law.min_area, most)
            aspect = math.exp(uniform(math.log(law.min_aspect), -math.log(law.min_aspect)))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < law.grid and width < law.grid:
                top, left = randint(0, law.grid - height), randint(0, law.grid - width)
                block = mask[top : top + height, left : left + width]
                if 0 < (gain := block.size - block.sum()) <= most:
                    block[:] = True
                    break
                gain = 0
        if not gain:
            break
        gains.append(int(gain))
    return Placing(mask, gains)


def completed(placing: Placing, law: BlockMasks, generator: np.random.RandomState) -> np.ndarray:
    """The mask with what is missing filled up, cell by cell: bool [grid, grid]."""
    mask = placing.mask.copy().ravel()
    free = np.flatnonzero(~mask)
    missing = law.num_masked - mask.sum()
    if missing:
        mask[generator.choice(free, missing, replace=False)] = True
    return mask.reshape(placing.mask.shape)


class Replay:
    """A sample's own numbers in place of a generator: four for every try."""

    def __init__(self, seed: int, epoch: int, sample_id: int) -> None:
        drawn = words(seed, epoch, np.array([sample_id]), Stream.BLOCKS, 40_000)[0] * 2.0**-32
        self.tries: Iterator[np.ndarray] = iter(drawn.reshape(-1, 4))
        self.current: list[float] = []

    def uniform(self, low: float, high: float) -> float:
        if len(self.current) != 3:  # the area begins a try; what the last one left unused is skipped
            self.current = list(next(self.tries))
        return low + (high - low) * self.current.pop(0)

    def randint(self, low: int, high: int) -> int:
        return low + int(self.current.pop(0) * (high - low + 1))


def own_placing(law: BlockMasks, seed: int, epoch: int, sample_id: int) -> Placing:
    """The rectangles of a sample's mask, by its own numbers."""
    replay = Replay(seed, epoch, sample_id)
    return place(law, replay.uniform, replay.randint)


def own_mask(law: BlockMasks, seed: int, epoch: int, sample_id: int) -> np.ndarray:
    """A sample's whole mask bool [grid * grid]: missing cells are those with the smallest numbers that are left."""
    mask = own_placing(law, seed, epoch, sample_id).mask.ravel().copy()
    noise = words(seed, epoch, np.array([sample_id]), Stream.MASK, law.grid**2)[0].astype(np.int64)
    left = np.flatnonzero(~mask)
    mask[left[noise[left].argsort(kind="stable")][: law.num_masked - mask.sum()]] = True
    return mask
