"""Draws depend on (seed, epoch, sample id) only, and follow the laws that they claim."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.schema import Data
from shards.draws import augmentations as draws
from shards.draws.philox import Stream

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def crops(ids: np.ndarray, height: int, width: int, seed: int = 0, epoch: int = 0) -> np.ndarray:
    sides = np.full(len(ids), height), np.full(len(ids), width)
    return draws.resized_crops(seed, epoch, ids, *sides, SCALE, RATIO)


def law(rng: random.Random, height: int, width: int) -> tuple[int, int, int, int]:
    """torchvision's RandomResizedCrop.get_params, written from its description, one image at a time."""
    for _ in range(10):
        area = height * width * rng.uniform(*SCALE)
        aspect = math.exp(rng.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(w / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(h * RATIO[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (300, 900), (224, 224)])
def test_crops_follow_torchvisions_law(height: int, width: int) -> None:
    """Largest distance between the distribution functions (Kolmogorov-Smirnov) of every side and place."""
    num = 20_000
    found = crops(np.arange(num), height, width)
    rng = random.Random(1)
    expected = np.array([law(rng, height, width) for _ in range(num)])
    for ours, theirs in zip(found.T, expected.T, strict=True):
        grid = np.arange(max(height, width) + 1)
        distance = np.abs(
            np.searchsorted(np.sort(ours), grid, "right") - np.searchsorted(np.sort(theirs), grid, "right")
        ).max()
        assert distance / num < 1.95 * math.sqrt(2 / num)  # exceeded by chance once in a thousand
    for product in (found[:, 2] * found[:, 3], found[:, 3] / found[:, 2]):
        assert np.isfinite(product).all()
    ours, theirs = (np.log(boxes[:, 3] / boxes[:, 2]) for boxes in (found, expected))
    assert ours.mean() == pytest.approx(theirs.mean(), abs=0.01)
    assert ours.std() == pytest.approx(theirs.std(), abs=0.01)


sides = st.one_of(st.integers(1, 8), st.integers(1, 65_500))
ratios = st.tuples(st.floats(0.05, 20), st.floats(1, 10)).map(lambda pair: (pair[0], pair[0] * pair[1]))


@given(sides, sides, ratios, st.floats(0.01, 1), st.integers(0, 2**64 - 1))
def test_crops_stay_inside_any_image(
    height: int, width: int, ratio: tuple[float, float], low: float, seed: int
) -> None:
    ids = np.arange(16)
    sizes = np.full(16, height), np.full(16, width)
    top, left, h, w = draws.resized_crops(seed, 3, ids, *sizes, (low, 1.0), ratio).T
    assert (h >= 1).all() and (w >= 1).all() and (top >= 0).all() and (left >= 0).all()
    assert (top + h <= height).all() and (left + w <= width).all()


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (1, 4000, (0, 1999, 1, 1)),
        (4000, 1, (1999, 0, 1, 1)),
        (10, 4000, (0, 1993, 10, 13)),
        (4000, 30, (1980, 0, 40, 30)),
    ],
)
def test_no_fitting_box_gives_the_largest_centred_one(height: int, width: int, expected: tuple[int, ...]) -> None:
    found = crops(np.arange(50), height, width)
    assert (found == expected).all()


numbers = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=30, unique=True).map(np.array)


@given(numbers, st.integers(0, 2**64 - 1), st.integers(0, 10**6), st.data())
def test_draws_do_not_depend_on_the_batch(ids: np.ndarray, seed: int, epoch: int, data: st.DataObject) -> None:
    """Any part of a batch, in any order, draws what the whole batch draws."""
    part = np.array(data.draw(st.permutations(range(len(ids)))))[: max(1, len(ids) // 2)]
    height, width = 40 + ids % 400, 50 + ids % 300
    whole = draws.pretrain_mae(Data(), seed, epoch, ids, height, width)
    alone = draws.pretrain_mae(Data(), seed, epoch, ids[part], height[part], width[part])
    for name, values in whole.items():
        assert values.flags.c_contiguous and len(values) == len(ids)
        np.testing.assert_array_equal(values[part], alone[name])
    noise = draws.mask_noise(seed, epoch, ids, 49)
    np.testing.assert_array_equal(noise[part], draws.mask_noise(seed, epoch, ids[part], 49))


def test_uniforms_are_uniform_and_streams_seeds_epochs_and_ids_are_independent() -> None:
    ids = np.arange(4096)
    sets = {
        (seed, epoch, stream): draws.uniforms(seed, epoch, ids, stream, 7)
        for seed in (0, 1, 2**32)
        for epoch in (0, 1)
        for stream in (Stream.CROP, Stream.FLIP, Stream.MASK)
    }
    values = np.stack([v.ravel() for v in sets.values()])
    assert values.dtype == np.float32 and values.min() >= 0 and values.max() < 1
    bound = 4.5 / math.sqrt(values.shape[1])
    assert np.abs(values.mean(1) - 0.5).max() < bound * math.sqrt(1 / 12)
    assert np.abs(np.corrcoef(values) - np.eye(len(values))).max() < bound
    neighbours = np.corrcoef(values[0].reshape(4096, 7)[:-1, 0], values[0].reshape(4096, 7)[1:, 0])[0, 1]
    assert abs(neighbours) < 4.5 / math.sqrt(4096)


def test_fewer_draws_are_the_beginning_of_more() -> None:
    """So a longer mask, or another image size, changes nothing that was drawn before."""
    ids = np.arange(9)
    np.testing.assert_array_equal(draws.mask_noise(5, 2, ids, 196)[:, :49], draws.mask_noise(5, 2, ids, 49))
    assert draws.mask_noise(5, 2, ids, 0).shape == (9, 0)


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_flips_come_with_their_probability(probability: float) -> None:
    found = draws.flips(0, 0, np.arange(10_000), probability)
    assert found.dtype == np.int32 and abs(found.mean() - probability) < 0.02 * (0 < probability < 1) + 1e-12


@pytest.mark.parametrize(
    ("height", "width", "resized", "corner"),
    [
        (375, 500, (256, 341), (16, 58)),  # 341.33 truncated; 58.5 to even
        (500, 375, (341, 256), (58, 16)),
        (256, 257, (256, 257), (16, 16)),  # 16.5 to even
        (256, 259, (256, 259), (16, 18)),  # 17.5 to even
        (224, 224, (256, 256), (16, 16)),
        (1, 1, (256, 256), (16, 16)),
        (2, 8000, (256, 1_024_000), (16, 511_888)),
    ],
)
def test_evaluation_geometry_is_torchvisions(
    height: int, width: int, resized: tuple[int, int], corner: tuple[int, int]
) -> None:
    found = draws.centre_crops(np.array([height]), np.array([width]), 224, 0.875)
    assert [tuple(values[0]) for values in found] == [resized, corner]


@given(sides, sides, st.integers(8, 512), st.floats(0.1, 1))
def test_evaluation_crop_lies_inside_and_follows_the_scalar_rule(
    height: int, width: int, image_size: int, eval_crop: float
) -> None:
    (resized,), (corner,) = draws.centre_crops(np.array([height]), np.array([width]), image_size, eval_crop)
    shorter = int(image_size / eval_crop)
    longer = int(shorter * max(height, width) / min(height, width))
    assert sorted(resized.tolist()) == [shorter, longer]
    assert (resized[0] > resized[1]) == (height > width) or shorter == longer
    assert corner.tolist() == [int(round((side - image_size) / 2.0)) for side in resized.tolist()]
    assert (corner >= 0).all() and (corner + image_size <= resized).all()


def test_evaluation_draws_nothing() -> None:
    height, width = np.array([30, 40]), np.array([50, 60])
    one = draws.evaluate(Data(), 0, 0, np.array([1, 2]), height, width)
    two = draws.evaluate(Data(), 9, 7, np.array([3, 4]), height, width)
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_order_and_draws_need_neither_dali_nor_torch() -> None:
    code = "import sys; from shards.draws import augmentations, order; "
    code += "print([m for m in ('nvidia.dali', 'torch') if m in sys.modules])"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
