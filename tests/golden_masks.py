"""dtm_masks*: the law of block-wise masks. Ours draw from Philox, so single masks differ and distributions must not.

The rule is checked in two steps: written out in scalar_masks.py it gives the released masks bit for bit from the
released generators, and our batches are that same rule on our own numbers.
"""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
from golden_files import Golden
from scalar_masks import completed, own_mask, own_placing, place

from shards.draws.block_masks import BlockMasks

NAMES = {"num_masking_patches": "num_masked", "min_num_patches": "min_area", "max_num_patches": "max_area"}
SIGMAS = 4.5  # standard errors of the difference of two samples
NUM_MASKS, NUM_PLACED, NUM_SAME = 12_000, 1_500, 64


def check_masks(golden: Golden) -> None:
    prefixes = [key.removesuffix("cfg") for key in golden.keys() if key.endswith("cfg")]
    assert prefixes, f"{golden.name}: no key ends with cfg, so no law is known"
    for prefix in prefixes:
        law = law_of(json.loads(str(golden.take(f"{prefix}cfg"))))
        check_rule(golden, prefix, law)
        if f"{prefix}n" in golden:
            num_theirs = int(golden.take(f"{prefix}n"))
            check_places(golden, prefix, law, num_theirs)
            check_rectangles(golden, prefix, law, num_theirs)


def law_of(settings: dict) -> BlockMasks:
    """The law in our words; AssertionError for a setting that has none."""
    settings = dict(settings)
    grid = np.unique(settings.pop("input_size"))
    assert len(grid) == 1, f"input_size={grid}: ours are square"
    low, high = settings.pop("min_aspect", 0.3), settings.pop("max_aspect", None)
    assert high is None or np.isclose(high, 1 / low), f"max_aspect={high}: ours is 1 / min_aspect = {1 / low}"
    assert settings.keys() <= NAMES.keys(), f"settings {settings.keys() - NAMES.keys()} are not known"
    return BlockMasks(grid=int(grid[0]), min_aspect=low, **{NAMES[name]: value for name, value in settings.items()})


def check_rule(golden: Golden, prefix: str, law: BlockMasks) -> None:
    generator, numpy_generator = random.Random(0), np.random.RandomState(0)
    if f"{prefix}first64" in golden:
        count = len(golden.take(f"{prefix}first64"))
        placings = (place(law, generator.uniform, generator.randint) for _ in range(count))
        found = np.stack([completed(placing, law, numpy_generator) for placing in placings])
        golden.same(f"{prefix}first64", found.astype(np.uint8))
    ours = law.masks(3, 2, np.arange(NUM_SAME))
    np.testing.assert_array_equal(ours, [own_mask(law, 3, 2, sample_id) for sample_id in range(NUM_SAME)])
    assert (ours.sum(1) == law.num_masked).all()


def check_places(golden: Golden, prefix: str, law: BlockMasks, num_theirs: int) -> None:
    """How often a cell is masked, and how often neighbours are alike."""
    masks = law.masks(1, 0, np.arange(NUM_MASKS)).reshape(NUM_MASKS, law.grid, law.grid)
    assert (masks.sum((1, 2)) == law.num_masked).all()
    spread = 1 / num_theirs + 1 / NUM_MASKS
    if f"{prefix}prob_map" in golden:
        theirs = golden.take(f"{prefix}prob_map")
        error = np.sqrt(np.maximum(theirs * (1 - theirs), 1 / num_theirs) * spread)
        np.testing.assert_array_less(np.abs(masks.mean(0) - theirs), SIGMAS * error, err_msg=f"{prefix}prob_map")
        golden.count(f"{prefix}prob_map")
    if f"{prefix}adj_mean_std" in golden:
        pairs = [masks[:, 1:] == masks[:, :-1], masks[:, :, 1:] == masks[:, :, :-1]]
        alike = np.concatenate([same.reshape(NUM_MASKS, -1) for same in pairs], 1).mean(1)
        mean, std = golden.take(f"{prefix}adj_mean_std")
        assert abs(alike.mean() - mean) < SIGMAS * alike.std() * np.sqrt(spread), f"{prefix}adj_mean"
        kurtosis = ((alike - alike.mean()) ** 4).mean() / alike.var() ** 2
        assert abs(alike.std() - std) < SIGMAS * alike.std() * np.sqrt((kurtosis - 1) / 4 * spread), f"{prefix}adj_std"
        golden.count(f"{prefix}adj_mean_std")


def check_rectangles(golden: Golden, prefix: str, law: BlockMasks, num_theirs: int) -> None:
    """How many, how many cells they cover before single ones fill up, and what the first one covers."""
    gains = [own_placing(law, 2, 0, sample_id).gains for sample_id in range(NUM_PLACED)]
    most = min(law.num_masked, law.max_area or law.num_masked)
    assert all(1 <= gain <= most for row in gains for gain in row)
    for name, found in (("nblocks", Counter(map(len, gains))), ("prefill", Counter(map(sum, gains)))):
        if prefix + name in golden:
            theirs = dict(golden.take(prefix + name).tolist())
            assert sum(theirs.values()) == num_theirs
            for value in theirs.keys() | found.keys():
                share = theirs.get(value, 0) / num_theirs
                error = np.sqrt(max(share * (1 - share), 1 / NUM_PLACED) * (1 / NUM_PLACED + 1 / num_theirs))
                assert abs(found[value] / NUM_PLACED - share) < SIGMAS * error, (prefix + name, value)
            golden.count(prefix + name)
    if f"{prefix}first_block_mean" in golden:
        first = np.array([row[0] for row in gains if row])
        error = first.std() * np.sqrt(1 / len(first) + 1 / num_theirs)
        theirs = float(golden.take(f"{prefix}first_block_mean"))
        assert abs(first.mean() - theirs) < SIGMAS * error, f"{prefix}first_block_mean"
        golden.count(f"{prefix}first_block_mean")
