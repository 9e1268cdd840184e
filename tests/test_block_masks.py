"""Block-wise masks: the released program's law, from draws that belong to the sample."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
from golden_files import read
from hypothesis import given
from hypothesis import strategies as st

from shards.block_masks import BlockMasks
from shards.mask_draws import MaskDraws
from shards.philox import Stream, words

LAWS = {  # as in dtm_masks.npz
    "base": BlockMasks(grid=14, num_masked=75),
    "m118": BlockMasks(grid=14, num_masked=118),
    "small": BlockMasks(grid=7, num_masked=18, min_area=4),
}


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


def completed(placing: Placing, law: BlockMasks) -> np.ndarray:
    mask = placing.mask.copy().ravel()
    free = np.flatnonzero(~mask)
    missing = law.num_masked - mask.sum()
    if missing:
        mask[np.random.choice(free, missing, replace=False)] = True
    return mask.reshape(placing.mask.shape)


class Replay:
    """A sample's own numbers in place of a generator: four for every try."""

    def __init__(self, seed: int, epoch: int, sample_id: int) -> None:
        drawn = words(seed, epoch, np.array([sample_id]), Stream.BLOCKS, 40_000)[0] * 2.0**-32
        self.tries, self.current = iter(drawn.reshape(-1, 4)), []

    def uniform(self, low: float, high: float) -> float:
        if len(self.current) != 3:  # the area begins a try; what the last one left unused is skipped
            self.current = list(next(self.tries))
        return low + (high - low) * self.current.pop(0)

    def randint(self, low: int, high: int) -> int:
        return low + int(self.current.pop(0) * (high - low + 1))


@pytest.mark.parametrize("name", LAWS)
def test_the_scalar_reference_is_the_released_program(name: str) -> None:
    """Bit for bit, from Python's and numpy's generators: so the rule is understood."""
    golden = read("dtm_masks.npz")
    law = LAWS[name]
    settings = json.loads(str(golden[f"{name}_cfg"]))
    assert (settings["input_size"], settings["num_masking_patches"]) == (law.grid, law.num_masked)
    assert settings["min_num_patches"] == law.min_area
    random.seed(0)
    np.random.seed(0)
    found = [completed(place(law, random.uniform, random.randint), law) for _ in range(64)]
    np.testing.assert_array_equal(np.stack(found), golden[f"{name}_first64"].astype(bool))


laws = st.builds(
    lambda grid, share, least, extra, aspect: BlockMasks(
        grid=grid,
        num_masked=int(share * grid**2),
        min_area=least,
        max_area=None if extra is None else least + extra,
        min_aspect=aspect,
    ),
    st.integers(1, 20), st.floats(0, 1), st.integers(1, 30), st.none() | st.integers(0, 60), st.floats(0.05, 1),
)  # fmt: skip


@given(laws, st.integers(0, 2**64 - 1), st.integers(0, 1000))
def test_batches_are_the_scalar_reference_on_the_same_numbers(law: BlockMasks, seed: int, epoch: int) -> None:
    ids = np.array([3, 10**9, 0, 77])
    masks = law.masks(seed, epoch, ids)
    assert masks.shape == (4, law.grid**2) and masks.dtype == bool
    assert (masks.sum(1) == law.num_masked).all()
    for sample_id, mask in zip(ids, masks, strict=True):
        replay = Replay(seed, epoch, sample_id)
        placed = place(law, replay.uniform, replay.randint).mask.ravel()
        assert mask[placed].all()
        # The cells that fill it up have the smallest of the sample's numbers, among those that are left.
        noise = words(seed, epoch, np.array([sample_id]), Stream.MASK, law.grid**2)[0].astype(np.int64)
        left = np.flatnonzero(~placed)
        added = left[noise[left].argsort(kind="stable")][: law.num_masked - placed.sum()]
        assert set(np.flatnonzero(mask)) == set(np.flatnonzero(placed)) | set(added)


@pytest.mark.parametrize("name", LAWS)
def test_masks_are_distributed_as_the_released_programs(name: str) -> None:
    """6,000 masks there, 12,000 here: place, neighbourhood. Bounds are 4.5 standard errors of the difference."""
    golden, law = read("dtm_masks.npz"), LAWS[name]
    num_theirs, num_ours = int(golden[f"{name}_n"]), 12_000
    masks = law.masks(1, 0, np.arange(num_ours)).reshape(num_ours, law.grid, law.grid)
    spread = 1 / num_theirs + 1 / num_ours
    theirs = golden[f"{name}_prob_map"]
    error = np.sqrt(theirs * (1 - theirs) * spread)
    assert (np.abs(masks.mean(0) - theirs) < 4.5 * error).all()
    pairs = [masks[:, 1:] == masks[:, :-1], masks[:, :, 1:] == masks[:, :, :-1]]
    adjacency = np.concatenate([same.reshape(num_ours, -1) for same in pairs], 1).mean(1)
    mean, std = golden[f"{name}_adj_mean_std"]
    assert abs(adjacency.mean() - mean) < 4.5 * std * np.sqrt(spread)
    assert adjacency.std() == pytest.approx(std, rel=0.06)


@pytest.mark.parametrize("name", LAWS)
def test_rectangles_are_distributed_as_the_released_programs(name: str) -> None:
    """How many, the first one's size, how many cells they cover: by the scalar reference on the samples' numbers."""
    golden, law, num = read("dtm_masks.npz"), LAWS[name], 1500
    placings = []
    for sample_id in range(num):
        replay = Replay(2, 0, sample_id)
        placings.append(place(law, replay.uniform, replay.randint))
    for key, counts in (
        ("nblocks", Counter(len(p.gains) for p in placings)),
        ("prefill", Counter(sum(p.gains) for p in placings)),
    ):
        theirs = dict(golden[f"{name}_{key}"].tolist())
        assert sum(theirs.values()) == 6000
        for value in theirs.keys() | counts.keys():
            share = theirs.get(value, 0) / 6000
            error = math.sqrt(max(share * (1 - share), 1 / num) * (1 / num + 1 / 6000))
            assert abs(counts[value] / num - share) < 4.5 * error, (key, value)
    first = np.array([p.gains[0] for p in placings])
    error = first.std() * math.sqrt(1 / num + 1 / 6000)
    assert abs(first.mean() - golden[f"{name}_first_block_mean"]) < 4.5 * error


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40, unique=True).map(np.array), st.data())
def test_masks_do_not_depend_on_the_batch(ids: np.ndarray, data: st.DataObject) -> None:
    part = np.array(data.draw(st.permutations(range(len(ids)))))[: max(1, len(ids) // 2)]
    masks = LAWS["base"].masks(4, 7, ids)
    np.testing.assert_array_equal(masks[part], LAWS["base"].masks(4, 7, ids[part]))


def test_masks_change_with_seed_epoch_and_sample() -> None:
    law, ids = LAWS["base"], np.arange(50)
    sets = [law.masks(seed, epoch, ids) for seed in (0, 1) for epoch in (0, 1)]
    assert len(np.unique(np.concatenate(sets), axis=0)) == 200


def test_mask_draws_are_noise_or_masks_or_neither() -> None:
    ids, law = np.arange(5), LAWS["small"]
    both = MaskDraws(num_noise=9, blocks=law).drawn(1, 2, ids)
    assert (both["noise"].shape, both["noise"].dtype) == ((5, 9), np.float32)
    np.testing.assert_array_equal(both["mask"], law.masks(1, 2, ids))
    neither = MaskDraws().drawn(1, 2, ids)
    assert neither["noise"].shape == (5, 0) and neither["mask"].shape == (5, 0) and neither["mask"].dtype == bool


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": 65}, "grid=65: 1 to 64"),
        ({"num_masked": 197}, "num_masked=197: the grid has 196 patches"),
        ({"min_area": 0}, "min_area=0, max_area=None: 1 <= min <= max"),
        ({"max_area": 15}, "min_area=16, max_area=15"),
        ({"min_aspect": 0.0}, "min_aspect=0.0"),
    ],
)
def test_impossible_laws_are_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockMasks(**{"grid": 14, "num_masked": 75, **change})
