"""Block-wise masks of BEiT (Bao et al., 2021, arXiv 2106.08254, algorithm 1), as DTM uses them (docs/methods.md).

Rectangles are placed one after the other until `num_masked` cells are covered or ten tries in a row have failed; what
is then missing is masked cell by cell. A sample's tries are numbered, and try t uses four random numbers of its own,
so a mask is a function of (seed, epoch, sample id). A whole batch advances try by try: a row of the grid is one 64-bit
word per sample, so placing a rectangle in all samples takes a handful of operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shards.draws.philox import Stream, words

_TRIES = 10  # for one rectangle
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
            rows, done = self._placed(_numbers(seed, epoch, ids[open_rows], Stream.BLOCKS, 4 * tries))
            cells[open_rows[done]] = _cells(rows[done], self.grid)
            open_rows, tries = open_rows[~done], 4 * tries
        self._fill_up(cells, seed, epoch, ids)
        return cells

    def _placed(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rectangles from [B, 4 tries] numbers: the grid's rows as bits, uint64 [B, grid], and which masks are done."""
        area, aspect, top, left = np.ascontiguousarray(numbers.reshape(len(numbers), -1, 4).T)  # each [tries, B]
        root = np.exp(0.5 * np.log(self.min_aspect) * (1 - 2 * aspect))  # of the aspect
        bits = np.zeros((len(numbers), self.grid), np.uint64)
        covered, failed = np.zeros((2, len(numbers)), np.int64)
        active = np.arange(len(numbers))
        for attempt in range(len(area)):
            active = active[(covered[active] < self.num_masked) & (failed[active] < _TRIES)]
            if not len(active):
                break
            mine = bits[active]
            most = np.minimum(self.num_masked - covered[active], self.max_area or self.num_masked)
            draw = (values[attempt, active] for values in (area, root, top, left))
            fresh = self._rectangles(mine, most, *draw)
            gain = np.bitwise_count(fresh).sum(1, dtype=np.int64)
            placed = (gain > 0) & (gain <= most)
            bits[active] = np.where(placed[:, None], mine | fresh, mine)
            covered[active] += np.where(placed, gain, 0)
            failed[active] = np.where(placed, 0, failed[active] + 1)
        return bits, (covered >= self.num_masked) | (failed >= _TRIES)

    def _rectangles(
        self, bits: np.ndarray, most: np.ndarray, area: np.ndarray, root: np.ndarray, top: np.ndarray, left: np.ndarray
    ) -> np.ndarray:
        """The cells that a drawn rectangle adds to `bits` [B, grid], none where it does not fit: uint64 [B, grid].

        A rectangle is always shorter than the grid on both sides. Where less is missing than `min_area`, the area is
        drawn between the two all the same, and the rectangle is later refused if it adds too much.
        """
        side = np.sqrt(self.min_area + (most - self.min_area) * area)
        height, width = np.rint(side * root).astype(np.int64), np.rint(side / root).astype(np.int64)
        fits = (height < self.grid) & (width < self.grid)
        height, width = np.where(fits, height, 0), np.where(fits, width, 0)
        first = (top * (self.grid - height + 1)).astype(np.int64)[:, None]
        start = (left * (self.grid - width + 1)).astype(np.uint64)
        span = ((np.uint64(1) << width.astype(np.uint64)) - np.uint64(1)) << start
        row = np.arange(self.grid)
        inside = (row >= first) & (row < first + height[:, None])
        return np.where(inside, span[:, None] & ~bits, np.uint64(0))

    def _fill_up(self, cells: np.ndarray, seed: int, epoch: int, ids: np.ndarray) -> None:
        """Mask as many cells as are missing, uniformly among the others: those with the smallest numbers."""
        missing = self.num_masked - cells.sum(1)
        short = np.flatnonzero(missing)
        if not len(short):
            return
        noise = words(seed, epoch, ids[short], Stream.MASK, self.grid**2).astype(np.uint64)
        noise[cells[short]] = 2**32
        chosen = noise.argsort(1, kind="stable")
        taken = np.arange(self.grid**2) < missing[short, None]
        added = np.zeros(chosen.shape, bool)
        np.put_along_axis(added, chosen, taken, 1)
        cells[short] |= added


def _numbers(seed: int, epoch: int, ids: np.ndarray, stream: Stream, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for each id, multiples of 2**-32: float64 [B, count]."""
    return words(seed, epoch, ids, stream, count) * 2.0**-32


def _cells(rows: np.ndarray, grid: int) -> np.ndarray:
    """Rows as bits, uint64 [B, grid], to bool [B, grid * grid]."""
    columns = np.arange(grid, dtype=np.uint64)
    return ((rows[:, :, None] >> columns) & np.uint64(1)).astype(bool).reshape(len(rows), grid**2)
