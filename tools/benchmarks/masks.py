"""Masks per CPU second: block-wise ones (75 of 14 x 14 patches, rectangles of 16 at least) and random ones.

Block-wise masks stand against BEiT's generator, one mask at a time in Python: the released program's, or one written
here after the paper (arXiv 2106.08254, algorithm 1). Random masks of LUT's two views stand against two sorts and a
gathering of the mask, as MAE's model does it.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator
from itertools import count

import numpy as np
import torch
from torch import Tensor

from engine.masks import disjoint_masks
from shards.draws.block_masks import BlockMasks
from tools.benchmarks.released import released
from tools.benchmarks.side_by_side import Row, Settings, compared, interleaved

LAW = BlockMasks(grid=14, num_masked=75, min_area=16)
BATCHES = (128, 1024)  # what one GPU of the papers' runs takes, and all together
COMPARED = 6000  # masks of each, whose distributions are held against each other
SIGMAS = 4.5  # standard errors by which their statistics may differ
MASK_RATIO = 0.75


def suite(settings: Settings) -> Iterator[Row]:
    """Rows of block-wise masks by batch, and of random masks."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    if settings.reference:
        with released(settings.reference, "dtm") as load:
            generator = load("utils.masking_generator").MaskingGenerator(LAW.grid, LAW.num_masked, LAW.min_area)
        other, theirs = "the released generator", lambda: np.asarray(generator(), bool)
    else:
        other, theirs = "a loop in Python", lambda: loop_mask(LAW)
    check_distribution(theirs, settings.scaled(COMPARED, 200))
    for batch in (settings.scaled(number, 8) for number in BATCHES):
        yield block_row(batch, theirs, other, settings.rounds)
    yield random_row(settings.scaled(BATCHES[0], 8), settings.rounds)


def block_row(batch: int, theirs: Callable[[], np.ndarray], other: str, rounds: int) -> Row:
    """Block-wise masks per CPU second, `batch` at a time; every round draws others."""
    epochs, ids = count(), np.arange(batch)
    works = (lambda: LAW.masks(0, next(epochs), ids)), (lambda: np.stack([theirs() for _ in range(batch)]))
    seconds = interleaved(works, rounds, time.process_time)
    return compared(f"block-wise masks, {batch} at a time, against {other}", batch, seconds, "masks/s")


def check_distribution(theirs: Callable[[], np.ndarray], number: int) -> None:
    """RuntimeError where `number` masks of each differ in count, in place or in the length of their borders."""
    pairs = LAW.masks(0, 0, np.arange(number)), np.stack([theirs().ravel() for _ in range(number)])
    for masks in pairs:
        if not (masks.sum(1) == LAW.num_masked).all():
            raise RuntimeError(f"block-wise masks: not all have {LAW.num_masked} patches")
    statistics = {"share of a patch": pairs, "border": tuple(map(perimeters, pairs))}
    for name, (ours, others) in statistics.items():
        error = np.sqrt((ours.var(0) + others.var(0)).clip(1 / number) / number)
        worst = (np.abs(ours.mean(0) - others.mean(0)) / error).max()
        if worst > SIGMAS:
            raise RuntimeError(f"block-wise masks: {name} differs by {worst:.1f} standard errors, more than {SIGMAS}")


def perimeters(masks: np.ndarray) -> np.ndarray:
    """Sides between a masked patch and one that is not, and their squares, per mask: [B, 2]."""
    grids = masks.reshape(len(masks), LAW.grid, LAW.grid)
    sides = (grids[:, 1:] != grids[:, :-1]).sum((1, 2)) + (grids[:, :, 1:] != grids[:, :, :-1]).sum((1, 2))
    return np.stack([sides, sides**2], axis=1).astype(float)


def loop_mask(law: BlockMasks) -> np.ndarray:
    """One mask, rectangle by rectangle: bool [grid, grid]."""
    mask, bound = np.zeros((law.grid, law.grid), bool), math.log(law.min_aspect)
    missing = law.num_masked
    while missing:
        for _ in range(10):
            area, aspect = random.uniform(law.min_area, missing), math.exp(random.uniform(bound, -bound))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if max(height, width) >= law.grid:
                continue
            top, left = random.randint(0, law.grid - height), random.randint(0, law.grid - width)
            block = mask[top : top + height, left : left + width]
            if 0 < (added := block.size - int(block.sum())) <= missing:
                block[:] = True
                missing -= added
                break
        else:  # no room for a rectangle: single patches
            mask.flat[np.random.choice(np.flatnonzero(~mask), missing, replace=False)] = True
            break
    return mask


def random_row(batch: int, rounds: int) -> Row:
    """Pairs of random masks per CPU second from noise [batch, N]; RuntimeError where the two give others."""
    noise = torch.rand(batch, LAW.grid**2, generator=torch.Generator().manual_seed(0))
    works = (lambda: disjoint_masks(noise, MASK_RATIO)), (lambda: sorted_masks(noise, MASK_RATIO))
    ours, theirs = (work() for work in works)
    for mine, (ids_keep, mask) in zip(ours, theirs, strict=True):
        if not (torch.equal(mine.ids_keep, ids_keep) and torch.equal(mine.mask, mask.bool())):
            raise RuntimeError("random masks: ours and those of two sorts differ")
    seconds = interleaved(works, rounds, time.process_time)
    return compared(f"pairs of random masks, {batch} at a time, against two sorts", batch, seconds, "pairs/s")


def sorted_masks(noise: Tensor, mask_ratio: float) -> list[tuple[Tensor, Tensor]]:
    """Kept patches [B, K] and masks [B, N] of ones and zeros, of two views: places by a second sort, masks gathered."""
    num_keep, views = int(noise.shape[1] * (1 - mask_ratio)), []
    ids_shuffle = torch.argsort(noise, dim=1)
    ids_restore = torch.argsort(ids_shuffle, dim=1)
    for first in (0, num_keep):
        mask = torch.ones_like(noise)
        mask[:, first : first + num_keep] = 0
        views.append((ids_shuffle[:, first : first + num_keep], mask.gather(1, ids_restore)))
    return views
