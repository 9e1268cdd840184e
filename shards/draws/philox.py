"""Random numbers by counting: Philox4x32-10, vectorised over samples.

A counter-based generator has no state: the number for (seed, epoch, sample, stream) is computed from those four and
from nothing else. So a draw cannot depend on the batch it is made in, on the rank, or on what was drawn before, and
a resume has nothing to restore. The generator is that of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011), and is ours down to the last bit: another version of numpy cannot change the order of a run.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)  # added to the key before each further round
_ROUNDS = 10
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


class Stream(IntEnum):
    """What a number is for. The values are part of every run's identity: append, never renumber."""

    ORDER_MEMBERS = 0  # which samples of one tar stand in one block
    ORDER_BLOCKS = 1  # which block comes when
    CROP = 2
    FLIP = 3
    MASK = 4
    MORPH = 5  # DTM's groupings; here the epoch is the optimizer step and the id the block of the global batch
    JITTER = 6
    EFFECT = 7
    BLOCKS = 8  # the rectangles of a block-wise mask; the cells that fill it up come from MASK
    SPLIT = 9  # DTM's two sets of tokens; here the epoch is the optimizer step and the id the place in the global batch
    CLUSTER = 10  # the tokens that k-means begins with; epoch and id as for SPLIT


def philox4x32(counter: tuple[np.ndarray, ...], key: tuple[int, int]) -> tuple[np.ndarray, ...]:
    """Ten rounds over four 32-bit counter words, each an array of uint64 below 2**32 (shapes broadcast)."""
    c0, c1, c2, c3 = counter
    for number in range(_ROUNDS):
        k0, k1 = (np.uint64((k + number * weyl) & 0xFFFFFFFF) for k, weyl in zip(key, _WEYL, strict=True))
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> _HALF) ^ c1 ^ k0, p1 & _LOW, (p0 >> _HALF) ^ c3 ^ k1, p0 & _LOW
    return c0, c1, c2, c3


def words(seed: int, epoch: int, ids: np.ndarray, stream: Stream, count: int, start: int = 0) -> np.ndarray:
    """`count` random 32-bit words for each id, from number `start` of its 2**34 on: uint32 [B, count].

    The counter is (id, epoch, block of four words, stream), the key is the seed.
    Raises ValueError for a seed outside 64 bits, or an epoch or id outside 32 bits.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"run.seed={seed}: outside 0 ... {2**64 - 1}; choose a seed in that range")
    ids = np.asarray(ids, np.int64)
    largest = max(epoch, int(ids.max(initial=0)))
    if min(epoch, int(ids.min(initial=0))) < 0 or largest >= 2**32:
        raise ValueError(f"epoch={epoch}, largest id={ids.max(initial=0)}: both must be in 0 ... {2**32 - 1}")
    skipped, first = start % 4, start // 4
    blocks = -(-(skipped + count) // 4)
    counter = (
        ids.astype(np.uint64)[:, None],
        np.uint64([[epoch]]),
        np.arange(first, first + blocks, dtype=np.uint64)[None],
        np.uint64([[stream]]),
    )
    rounds = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
    out = np.empty((len(ids), blocks, 4), np.uint32)
    for lane, values in enumerate(rounds):
        out[..., lane] = values
    return np.ascontiguousarray(out.reshape(len(ids), 4 * blocks)[:, skipped : skipped + count])


def keys64(seed: int, epoch: int, ids: np.ndarray, stream: Stream) -> np.ndarray:
    """One random 64-bit sorting key for each id: uint64 [B]."""
    pair = words(seed, epoch, ids, stream, 2).astype(np.uint64)
    return (pair[:, 0] << _HALF) | pair[:, 1]
