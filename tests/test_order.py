"""The order is a permutation in blocks, the same everywhere, and the ranks' parts make up the batch."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.draws.order import GlobalOrder, epoch_order, micro_positions, num_micro_steps, steps_per_epoch
from shards.draws.philox import Stream, keys64, philox4x32

# philox4x32-10 in Random123's kat_vectors: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter: str, key: str, expected: str) -> None:
    out = philox4x32(tuple(np.uint64([word]) for word in numbers(counter)), tuple(numbers(key)))
    assert [int(word[0]) for word in out] == numbers(expected)


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """The definition in Python integers, one counter at a time."""
    c, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.sampled_from(Stream))
def test_keys_are_the_definition(seed: int, epoch: int, sample: int, stream: Stream) -> None:
    first, second, *_ = scalar_philox([sample, epoch, 0, stream], [seed % 2**32, seed >> 32])
    assert int(keys64(seed, epoch, np.array([sample]), stream)[0]) == (first << 32) | second


def test_seed_epoch_and_id_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match="run.seed=-1"):
        keys64(-1, 0, np.arange(3), Stream.MASK)
    with pytest.raises(ValueError, match="largest id=4294967296"):
        keys64(0, 0, np.array([2**32]), Stream.MASK)
    with pytest.raises(ValueError, match="epoch=-1"):
        keys64(0, -1, np.arange(3), Stream.MASK)


tars = st.lists(st.integers(1, 40), min_size=1, max_size=6).map(
    lambda counts: np.repeat(np.arange(len(counts)), counts)
)


@given(tars, st.integers(1, 20), st.integers(0, 2**64 - 1), st.integers(0, 1000))
def test_order_is_a_permutation_in_blocks_of_one_tar(tar: np.ndarray, block: int, seed: int, epoch: int) -> None:
    order = epoch_order(seed, epoch, tar, block)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(len(tar)))
    # Blocks can be recovered by walking: each is `block` of one tar, or what its tar had left over.
    leftover = {int(t): int(np.sum(tar == t)) % block for t in np.unique(tar)}
    possible = {0}  # places where a block may end
    for start in range(len(order)):
        if start in possible:
            for length in {block, leftover[int(tar[order[start]])]} - {0}:
                members = tar[order[start : start + length]]
                if len(members) == length and (members == members[0]).all():
                    possible.add(start + length)
    assert len(order) in possible


@given(st.integers(1, 300), st.integers(0, 2**64 - 1), st.integers(0, 50))
def test_order_of_single_samples_sorts_independent_keys(num: int, seed: int, epoch: int) -> None:
    """By hand for one tar and blocks of one: sort by member key, then those places by block key."""

    def key(number: int, stream: Stream) -> int:
        first, second, *_ = scalar_philox([number, epoch, 0, stream], [seed % 2**32, seed >> 32])
        return (first << 32) | second

    members = sorted(range(num), key=lambda sample: key(sample, Stream.ORDER_MEMBERS))
    expected = [members[place] for place in sorted(range(num), key=lambda p: key(p, Stream.ORDER_BLOCKS))]
    assert epoch_order(seed, epoch, np.zeros(num, np.int32)).tolist() == expected


def pairs_in_blocks(order: np.ndarray, size: int) -> set[tuple[int, int]]:
    return {pair for block in order.reshape(-1, size) for pair in combinations(sorted(block.tolist()), 2)}


def test_epochs_and_seeds_differ_and_members_of_blocks_are_redrawn() -> None:
    tar = np.repeat(np.arange(4), 64)
    first, again, other = epoch_order(1, 0, tar, 16), epoch_order(1, 1, tar, 16), epoch_order(2, 0, tar, 16)
    assert (first != again).mean() > 0.9 and (first != other).mean() > 0.9
    met = [pairs_in_blocks(order, 16) for order in (first, again)]
    chance = 15 / 63  # that two samples of one tar of 64 share a block of 16
    assert len(met[0] & met[1]) / len(met[0]) == pytest.approx(chance, abs=0.06)


def test_order_shuffles_uniformly() -> None:
    """Mean place of each sample over epochs, and which sample follows which: no structure left."""
    tar = np.repeat(np.arange(5), 10)
    places = np.stack([np.argsort(epoch_order(3, epoch, tar)) for epoch in range(2000)])
    deviation = np.sqrt((50**2 - 1) / 12 / 2000)  # of the mean of 2,000 uniform places
    assert np.abs(places.mean(0) - 24.5).max() < 4.5 * deviation
    assert np.abs(np.corrcoef(places.T) - np.eye(50)).max() < 0.12


sizes = st.tuples(st.integers(1, 8), st.integers(1, 6), st.integers(1, 4))  # micro-batch, ranks, micro-steps


@given(sizes)
def test_parts_of_all_ranks_are_disjoint_and_make_up_the_batch(size: tuple[int, int, int]) -> None:
    micro, world, steps = size
    parts = [micro_positions(j, micro, r, world) for j in range(steps) for r in range(world)]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(micro * world * steps))
    assert num_micro_steps(micro * world * steps, micro, world) == steps
    for j in range(steps):  # only the product decides which samples share a micro-step
        together = np.concatenate([micro_positions(j, micro, r, world) for r in range(world)])
        np.testing.assert_array_equal(together, micro_positions(j, micro * world, 0, 1))


@given(tars, sizes, st.integers(0, 99), st.integers(1, 5))
def test_every_epoch_shows_a_sample_at_most_once_and_leaves_out_the_remainder(
    tar: np.ndarray, size: tuple[int, int, int], seed: int, block: int
) -> None:
    micro, world, steps = size
    batch = micro * world * steps
    if batch > len(tar):
        with pytest.raises(ValueError, match=f"global_batch={batch}: more than the {len(tar)} "):
            GlobalOrder(tar, seed=seed, global_batch=batch)
        return
    order = GlobalOrder(tar, seed=seed, global_batch=batch, block_size=block)
    assert order.steps_per_epoch == steps_per_epoch(len(tar), batch) == len(tar) // batch
    for epoch in range(2):
        shown = [
            order.global_batch_ids(step)[micro_positions(j, micro, r, world)]
            for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
            for j in range(steps)
            for r in range(world)
        ]
        assert len(np.unique(np.concatenate(shown))) == len(tar) - len(tar) % batch


@given(tars, st.integers(0, 60))
def test_resume_is_a_subtraction(tar: np.ndarray, step: int) -> None:
    batch = max(1, len(tar) // 3)
    running = GlobalOrder(tar, seed=4, global_batch=batch)
    for earlier in range(step):
        running.global_batch_ids(earlier)
    fresh = GlobalOrder(tar, seed=4, global_batch=batch)
    np.testing.assert_array_equal(running.global_batch_ids(step), fresh.global_batch_ids(step))
    assert fresh.epoch(step) == step // (len(tar) // batch)


def test_left_out_samples_change_from_epoch_to_epoch() -> None:
    order = GlobalOrder(np.zeros(103, np.int32), seed=0, global_batch=20)
    left = [
        set(range(103)) - set(np.concatenate([order.global_batch_ids(5 * e + b) for b in range(5)]).tolist())
        for e in range(20)
    ]
    assert all(len(ids) == 3 for ids in left)
    assert len(set.union(*left)) > 30


def test_micro_batch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="optim.global_batch=16: cannot be shared equally by 3 ranks"):
        num_micro_steps(16, 4, 3)
