"""Block-wise masks: functions of the sample's own numbers. Their law is held to the released one by test_golden.py."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scalar_masks import own_mask

from shards.draws.block_masks import BlockMasks
from shards.draws.masks import MaskDraws

LAWS = {
    "base": BlockMasks(grid=14, num_masked=75),
    "m118": BlockMasks(grid=14, num_masked=118),
    "small": BlockMasks(grid=7, num_masked=18, min_area=4),
}


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
        np.testing.assert_array_equal(mask, own_mask(law, seed, epoch, sample_id))


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
