"""Which sample at which step: pure functions of (seed, epoch), the same on every rank.

The order of an epoch is a permutation of all sample ids. Global batch b of the epoch is its b-th slice of
`global_batch` samples, and each rank takes its part of every micro-step's share of that slice. So all ranks have the
same number of steps by construction, a resume at step s simply starts at step s, and a resume on another number of
ranks sees the same global batches. The last N % global_batch samples of an epoch's order are left out: different
ones each epoch.

Samples are read in blocks of `block_size` members of one tar. Which samples share a block is redrawn each epoch (with
fixed members, a pair that met once would meet again 28 times too often, by simulation), and blocks
are shuffled over all tars. `block_size` 1 is a uniform shuffle.

Errors: numbers that do not fit each other raise ValueError with both.
"""

from __future__ import annotations

import numpy as np

from recipes.sections.optim import largest_divisor
from shards.draws.philox import Stream, keys64


def epoch_order(seed: int, epoch: int, tar: np.ndarray, block_size: int = 1) -> np.ndarray:
    """All sample ids in the order of `epoch`: int64 [N], a permutation.

    `tar` [N] tells which tar holds a sample (`Dataset.tar`). A tar's last block may be shorter than `block_size`.
    """
    num = len(tar)
    member_keys = keys64(seed, epoch, np.arange(num), Stream.ORDER_MEMBERS)
    by_tar = np.lexsort((member_keys, tar))  # stable; tars apart, members shuffled within
    counts = np.unique(tar, return_counts=True)[1]
    place = np.arange(num) - np.repeat(np.cumsum(counts) - counts, counts)  # of a sample within its tar
    block = np.cumsum(place % block_size == 0) - 1
    block_keys = keys64(seed, epoch, np.arange(block[-1] + 1 if num else 0), Stream.ORDER_BLOCKS)
    return by_tar[np.argsort(block_keys[block], kind="stable")]


def steps_per_epoch(num_samples: int, global_batch: int) -> int:
    """Whole global batches in one epoch; ValueError if there is none."""
    steps = num_samples // global_batch
    if steps == 0:
        raise ValueError(
            f"optim.global_batch={global_batch}: more than the {num_samples} training samples, so an epoch has no "
            f"step; choose at most {num_samples} or more data"
        )
    return steps


def num_micro_steps(global_batch: int, micro_batch: int, world_size: int) -> int:
    """Micro-steps of one optimizer step; ValueError naming a size that fits unless they come out even."""
    if global_batch % world_size:
        raise ValueError(
            f"optim.global_batch={global_batch}: cannot be shared equally by {world_size} ranks; "
            f"choose a multiple of {world_size}"
        )
    if global_batch % (micro_batch * world_size):
        raise ValueError(
            f"optim.micro_batch={micro_batch}: {micro_batch} x {world_size} ranks does not divide "
            f"optim.global_batch={global_batch}; "
            f"set optim.micro_batch={largest_divisor(global_batch // world_size, micro_batch)}"
        )
    return global_batch // (micro_batch * world_size)


def micro_positions(micro_step: int, micro_batch: int, rank: int, world_size: int) -> np.ndarray:
    """Places in the global batch that `rank` takes at `micro_step`: int64 [micro_batch].

    Samples of one micro-step are neighbours in the global batch whatever their rank, so only the product
    micro_batch x world_size decides which samples share a micro-step (batch norm over ranks sees the same ones).
    """
    return (micro_step * world_size + rank) * micro_batch + np.arange(micro_batch, dtype=np.int64)


class GlobalOrder:
    """The global batches of a run: `global_batch_ids(step)` for any step, from any starting point."""

    def __init__(self, tar: np.ndarray, *, seed: int, global_batch: int, block_size: int = 1) -> None:
        """`tar` [N] as in `epoch_order`; ValueError if N samples do not fill one global batch."""
        self.steps_per_epoch = steps_per_epoch(len(tar), global_batch)
        self.global_batch = global_batch
        self._tar, self._seed, self._block_size = tar, seed, block_size
        self._cached: tuple[int, np.ndarray] | None = None  # steps come in order: one epoch is enough

    def epoch(self, step: int) -> int:
        """The epoch that `step` belongs to, from 0."""
        return step // self.steps_per_epoch

    def global_batch_ids(self, step: int) -> np.ndarray:
        """Sample ids of the global batch of `step`: int64 [global_batch]."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._cached is None or self._cached[0] != epoch:
            self._cached = (epoch, epoch_order(self._seed, epoch, self._tar, self._block_size))
        return self._cached[1][within * self.global_batch : (within + 1) * self.global_batch]
