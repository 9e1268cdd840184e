"""Block-wise masks of BEiT (Bao et al., 2021, arXiv 2106.08254, algorithm 1), as DTM uses them (docs/methods.md).

Rectangles are placed one after the other until `num_masked` cells are covered or ten tries in a row have failed; what
is then missing is masked cell by cell. A sample's tries are numbered, and try t uses four random numbers of its own,
so a mask is a function of (seed, epoch, sample id). A whole batch advances try by try: as many rows of the grid as
there is room for share a 64-bit word, so placing a rectangle in all samples takes a handful of operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from shards.draws.philox import Stream, words

_TRIES = 10  # for one rectangle
_PRUNE = 8  # tries after which the masks that are done are put aside
_PLACE_BITS = np.uint64(12)  # for the number of a cell
_ONE = np.uint64(1)
_FIRST = 32  # tries that are drawn at first: more than 99.8 % of the masks need (75 of 14 x 14)


@dataclass(frozen=True, kw_only=True)
class BlockMasks:
    """The law of a mask over a grid of `grid` x `grid` patches, of which exactly `num_masked` are masked.

    ValueError where no such mask exists.
    """

    grid: int  # patches of a side, at most 64
    num_masked: int  # patches
    min_area: int = 16  # patches; of a rectangle, as it is drawn
    max_area: int | None = None  # patches; none: num_masked
    min_aspect: float = 0.3  # height / width is log-uniform between this and its inverse

    def __post_init__(self) -> None:
        if not 1 <= self.grid <= 64:
            raise ValueError(f"grid={self.grid}: 1 to 64 patches of a side are needed")
        if not 0 <= self.num_masked <= self.grid**2:
            raise ValueError(f"num_masked={self.num_masked}: the grid has {self.grid**2} patches; choose no more")
        if self.min_area < 1 or (self.max_area is not None and self.max_area < self.min_area):
            raise ValueError(f"min_area={self.min_area}, max_area={self.max_area}: 1 <= min <= max patches are needed")
        if not 0 < self.min_aspect <= 1:
            raise ValueError(f"min_aspect={self.min_aspect}: a number in (0, 1] is needed")

    def masks(self, seed: int, epoch: int, ids: np.ndarray) -> np.ndarray:
        """The masks of these samples: bool [B, grid * grid], row by row, True = masked."""
        ids = np.asarray(ids, np.int64)
        cells = np.empty((len(ids), self.grid**2), bool)
        tries, open_rows = _FIRST, np.arange(len(ids))
        while len(open_rows):  # at most num_masked rectangles of ten tries each
            packed, done = self._placed(_numbers(seed, epoch, ids[open_rows], Stream.BLOCKS, 4 * tries))
            cells[open_rows[done]] = _cells(packed[done], self.grid)
            open_rows, tries = open_rows[~done], 4 * tries
        self._fill_up(cells, seed, epoch, ids)
        return cells

    def _placed(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rectangles from [B, 4 tries] numbers: the grid as bits, uint64 [B, words], and which masks are done."""
        area, aspect, top, left = np.ascontiguousarray(numbers.reshape(len(numbers), -1, 4).T)  # each [tries, B]
        root = np.exp(0.5 * np.log(self.min_aspect) * (1 - 2 * aspect))  # of the aspect
        bits = np.zeros((len(numbers), _bands(self.grid).shape[-1]), np.uint64)
        missing, failed = np.full(len(numbers), self.num_masked), np.zeros(len(numbers), np.int64)
        for first in range(0, len(area), _PRUNE):
            active = np.flatnonzero((missing > 0) & (failed < _TRIES))
            if not len(active):
                break
            draws = (values[first : first + _PRUNE, active] for values in (area, root, top, left))
            state = bits[active], missing[active], failed[active]
            for draw in zip(*draws, strict=True):
                self._try(*state, *draw)
            bits[active], missing[active], failed[active] = state
        return bits, (missing <= 0) | (failed >= _TRIES)

    def _try(self, bits: np.ndarray, missing: np.ndarray, failed: np.ndarray, *draw: np.ndarray) -> None:
        """Place a rectangle where it fits and adds cells, but not too many, in place; what is done stays as it is."""
        most = missing if self.max_area is None else np.minimum(missing, self.max_area)
        fresh = self._rectangles(bits, most, *draw)
        gain = np.bitwise_count(fresh).sum(1, dtype=np.int64)
        placed = (gain > 0) & (gain <= most) & (failed < _TRIES)
        bits |= fresh * placed[:, None]
        missing -= gain * placed
        failed[:] = np.where(placed, 0, failed + 1)

    def _rectangles(
        self, bits: np.ndarray, most: np.ndarray, area: np.ndarray, root: np.ndarray, top: np.ndarray, left: np.ndarray
    ) -> np.ndarray:
        """The cells that a drawn rectangle adds to `bits` [B, words], none where it does not fit: uint64 [B, words].

        A rectangle is always shorter than the grid on both sides. Where less is missing than `min_area`, the area is
        drawn between the two all the same, and the rectangle is later refused if it adds too much.
        """
        side = np.sqrt(self.min_area + (most - self.min_area) * area)
        height, width = np.rint(side * root), np.rint(side / root)
        fits = (height < self.grid) & (width < self.grid)
        height, width = height * fits, width * fits
        first = (top * (self.grid - height + 1)).astype(np.int64)
        start = (left * (self.grid - width + 1)).astype(np.uint64)
        span = ((_ONE << width.astype(np.uint64)) - _ONE) << start
        return _bands(self.grid)[height.astype(np.int64), first] * span[:, None] & ~bits

    def _fill_up(self, cells: np.ndarray, seed: int, epoch: int, ids: np.ndarray) -> None:
        """Mask as many cells as are missing, uniformly among the others: those with the smallest numbers."""
        missing = self.num_masked - cells.sum(1)
        short = np.flatnonzero(missing)
        if not len(short):
            return
        noise = words(seed, epoch, ids[short], Stream.MASK, self.grid**2).astype(np.uint64)
        noise[cells[short]] = 2**32
        noise = noise << _PLACE_BITS | np.arange(self.grid**2, dtype=np.uint64)  # of equal numbers the lower place
        last = np.take_along_axis(np.sort(noise, axis=1), missing[short, None] - 1, 1)
        cells[short] |= noise <= last


@lru_cache
def _bands(grid: int) -> np.ndarray:
    """Rows of a grid from one on, as many as a rectangle is high: uint64 [height, first, words], a row's first bit set.

    A product with the bits of a row sets these in all of them.
    """
    size, row, per_word = np.arange(grid + 1), np.arange(grid), 64 // grid
    inside = (row >= size[:, None]) & (row < size[:, None] + size[:, None, None])
    first_bits = inside * (_ONE << (row % per_word * grid).astype(np.uint64))
    return np.add.reduceat(first_bits, row[::per_word], axis=-1)


def _numbers(seed: int, epoch: int, ids: np.ndarray, stream: Stream, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for each id, multiples of 2**-32: float64 [B, count]."""
    return words(seed, epoch, ids, stream, count) * 2.0**-32


def _cells(packed: np.ndarray, grid: int) -> np.ndarray:
    """The grid as bits, uint64 [B, words], to bool [B, grid * grid]."""
    bit = np.arange(64 // grid * grid, dtype=np.uint64)
    cells = ((packed[:, :, None] >> bit) & _ONE).astype(bool)  # [B, words, bits of a word]
    return cells.reshape(len(packed), packed.shape[1] * len(bit))[:, : grid**2]
