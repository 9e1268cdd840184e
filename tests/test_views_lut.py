"""LUT's two views: DALI agrees with the reference, which test_golden.py holds to the released program; the draws."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_views import OPERATIONS, jitter_row, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from images import encode, jpeg_bytes
from operators import apply, level_difference, pictures
from PIL import Image
from tars import make_dataset

from recipes.schema import Data
from shards.augment import graphs, photometry, reference
from shards.augment.views import VIEWS
from shards.dataset import Dataset
from shards.draws import augmentations as draws
from shards.draws.augmentations import Effect, Jitter
from shards.reading.loader import EvaluationLoader

LUT = Data(image_size=32, crop="src", brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_prob=0.8, threads=1)

# --- DALI agrees with the reference ---------------------------------------------------------------------------------

PICTURES = pictures(24)


def jitter_difference(samples: list[draws.Draws], images: list[np.ndarray]) -> np.ndarray:
    found = apply(lambda nodes, drawn: photometry.jitter(nodes, drawn), images, rows(*samples))
    pairs = zip(images, samples, strict=True)
    expected = [np.asarray(reference.jittered(Image.fromarray(image), row)) for image, row in pairs]
    assert [(image.shape, image.dtype) for image in found] == [(image.shape, np.uint8) for image in images]
    return level_difference(found, expected)


@pytest.mark.parametrize("operation", Jitter, ids=lambda op: op.name.lower())
def test_jitter_operations_agree_with_pil(operation: Jitter) -> None:
    """Mean absolute difference of an image, in levels of 255."""
    samples = []
    for k in range(len(PICTURES)):
        u = np.random.default_rng(k).uniform(-1, 1)
        samples.append(jitter_row((operation,), 1 + 0.4 * u, 1 + 0.4 * u, 1 + 0.4 * u, 0.16 * u))
    difference = jitter_difference(samples, PICTURES)
    limit = {Jitter.NONE: 0.0, Jitter.BRIGHTNESS: 0.1, Jitter.HUE: 1.1}.get(operation, 0.6)
    assert difference.max() <= limit, difference.round(2)


def test_jitters_of_all_orders_agree_with_pil() -> None:
    """Every order of four on pictures of every kind, so that clamping between the operations counts."""
    ids = np.arange(144)
    drawn = draws.jitters(LUT, 3, 0, ids)
    assert len(np.unique(drawn["order"], axis=0)) == 25
    samples = [{name: column[k] for name, column in drawn.items()} for k in ids]
    difference = jitter_difference(samples, [PICTURES[k % len(PICTURES)] for k in ids])
    assert difference[drawn["order"][:, 0] == Jitter.NONE].max() == 0
    assert difference.max() <= 1.8 and difference.mean() <= 1.0, (difference.max(), difference.mean())


def test_effects_agree_with_pil() -> None:
    sigma = np.array([0.1, 0.1, 0.1, 0.2, 0.3, 0.37, 0.5, 0.7, 0.85, 1.0, 1.3, 2.0], np.float32)
    effect = np.array([Effect.GRAY, Effect.SOLARIZE, *[Effect.BLUR] * 10], np.int32)
    drawn = {"effect": effect, "sigma": draws.sigmas(sigma)}
    for image, threshold in zip(PICTURES[:7], (128, 77, 255, 1, 0, 200, 128), strict=True):
        found = apply(lambda nodes, d, t=threshold: photometry.effect(nodes, d, t), [image] * len(sigma), drawn)
        expected = [
            np.asarray(reference.changed(Image.fromarray(image), {"effect": k, "sigma": s}, threshold))
            for k, s in zip(effect, drawn["sigma"], strict=True)
        ]
        difference = level_difference(found, expected)
        assert difference[0] < 0.01 and difference[1] == 0 and difference[2] < 0.15, difference.round(2)
        assert difference[3:].max() <= 1.0, difference.round(2)


def test_padding_reflects_without_the_edge() -> None:
    image = PICTURES[1]
    for padding in (0, 1, 4):
        (found,) = apply(lambda nodes, _, p=padding: graphs._reflected(nodes, p), [image])
        np.testing.assert_array_equal(found, np.pad(image, [(padding, padding)] * 2 + [(0, 0)], mode="reflect"))


IMAGES = {
    "4:2:0": jpeg_bytes(1, 151, 117, subsampling=2),
    "tall": jpeg_bytes(2, 90, 240),
    "gray": encode(Image.fromarray(pictures(1, 128)[0]).convert("L")),
    "png": encode(Image.fromarray(pictures(2, 100)[1]), "PNG"),
    "bright": encode(Image.fromarray(pictures(5, 130)[4])),
    "large": jpeg_bytes(5, 500, 375),
    "small": jpeg_bytes(6, 20, 30),
    "1 x 1": jpeg_bytes(7, 1, 1),
    "flat": jpeg_bytes(8, 900, 4),
}


COPIES = 8  # of every image, so that it is seen under as many draws


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("lut"), list(IMAGES.values()) * COPIES, per_tar=20)


def served(dataset: Dataset, data: Data, batch: int) -> list[np.ndarray]:
    """The two views [M, 3, S, S] of every sample through DALI."""
    ids, cpu = np.arange(len(dataset)), torch.device("cpu")
    with EvaluationLoader(
        dataset, ids, data=data, batch=batch, device=cpu, view="pretrain_lut", check_sources=True
    ) as loader:
        batches = list(loader)
    return [torch.cat([batch.views[k] for batch in batches]).numpy() for k in range(2)]


Both = tuple[list[np.ndarray], list[np.ndarray]]


GEOMETRIES = {
    "src": {"crop": "src"},
    "rrc": {"crop": "rrc"},
    "src, shared": {"crop": "src", "shared_crop": True},
    "rrc, shared": {"crop": "rrc", "shared_crop": True},
}


@pytest.fixture(scope="module", params=GEOMETRIES.values(), ids=list(GEOMETRIES))
def both(request: pytest.FixtureRequest, dataset: Dataset) -> Both:
    """The two views of every sample in levels of 255, through DALI and through PIL."""
    data = dataclasses.replace(LUT, image_size=64, **request.param)
    expected = VIEWS["pretrain_lut"].referenced(dataset, data, 0, 0, np.arange(len(dataset)))
    levels = 255 * np.float32(data.std).reshape(3, 1, 1)
    return [view * levels for view in served(dataset, data, 24)], [view * levels for view in expected]


def test_views_agree_with_pil(both: Both) -> None:
    """Mean absolute difference of an image: at most 0.6 clean and 2 distorted.

    `flat` is four high-contrast rows blown up: there DALI's tabulated cubic filter is up to 7 levels off.
    """
    clean, strong = (
        np.abs(ours - theirs).mean((1, 2, 3)).reshape(COPIES, -1) for ours, theirs in zip(*both, strict=True)
    )
    steep = [name == "flat" for name in IMAGES]
    assert (clean.max(0) <= np.where(steep, 1.5, 0.6)).all(), dict(zip(IMAGES, clean.max(0).round(2), strict=True))
    assert (strong.max(0) <= np.where(steep, 3.0, 2.0)).all(), dict(zip(IMAGES, strong.max(0).round(2), strict=True))
    assert clean.mean() < 0.3 and strong.mean() < 0.8, (clean.mean(), strong.mean())


def test_views_do_not_depend_on_the_batch(dataset: Dataset) -> None:
    """To the last bit, though every operation sees another part of the batch."""
    for one, other in zip(served(dataset, LUT, 24), served(dataset, LUT, 7), strict=True):
        np.testing.assert_array_equal(one, other)


def bytes_of(views: np.ndarray, data: Data) -> np.ndarray:
    """Normalised views as the 8-bit levels they were made of."""
    mean, std = (np.float32(values).reshape(3, 1, 1) for values in (data.mean, data.std))
    return np.rint((views * std + mean) * 255).astype(np.int64)


@pytest.mark.parametrize("crop", ["src", "rrc"])
def test_a_shared_crop_changes_colours_only(dataset: Dataset, crop: str) -> None:
    """Without jitter the second image is the first one's gray, its levels inverted from 128 on, or its blur."""
    data = Data(image_size=48, crop=crop, shared_crop=True, threads=1)
    clean, strong = (bytes_of(view, data) for view in served(dataset, data, 24))
    ids = np.arange(len(dataset))
    drawn = VIEWS["pretrain_lut"].drawn(dataset, data, 0, 0, ids)
    assert {0, 1} == set(drawn["mirror"].tolist())
    for row, kind in enumerate(drawn["effect"]):
        if kind == Effect.SOLARIZE:
            np.testing.assert_array_equal(strong[row], np.where(clean[row] >= 128, 255 - clean[row], clean[row]))
        elif kind == Effect.GRAY:
            luma = np.tensordot([0.299, 0.587, 0.114], clean[row], 1)
            assert np.abs(strong[row] - luma).max() <= 1
        else:
            assert np.abs(strong[row].mean((1, 2)) - clean[row].mean((1, 2))).max() < 6
    apart = [bytes_of(view, data) for view in served(dataset, dataclasses.replace(data, shared_crop=False), 24)]
    assert np.abs(clean - apart[0]).mean((1, 2, 3)).max() < 0.6  # the first image is what it was
    assert (np.abs(strong - apart[1]).mean((1, 2, 3)) > 2).mean() > 0.5  # the second one is not


@pytest.mark.parametrize(("shared", "cuts"), [(False, 2), (True, 1)])
def test_a_shared_crop_is_cut_once(dataset: Dataset, shared: bool, cuts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    cut = graphs._cut
    monkeypatch.setattr(graphs, "_cut", lambda *arguments: made.append(1) or cut(*arguments))
    served(dataset, dataclasses.replace(LUT, shared_crop=shared), len(dataset))
    assert len(made) == cuts  # one segment, so one graph


def test_both_views_come_of_one_decoding_and_one_resize(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    resized, decoded = graphs.resized, graphs.fn.decoders.image
    monkeypatch.setattr(graphs, "resized", lambda *arguments: made.append("resize") or resized(*arguments))
    monkeypatch.setattr(graphs.fn.decoders, "image", lambda *a, **k: made.append("decode") or decoded(*a, **k))
    served(dataset, LUT, len(dataset))
    assert made == ["decode", "resize"]


def test_simple_crop_of_a_square_without_padding_is_the_whole_image(tmp_path: Path) -> None:
    """What a random resized crop practically never is; for MAE's view and LUT's first."""
    encoded = [encode(Image.fromarray(image), "PNG") for image in pictures(6, 64)]
    dataset, ids = make_dataset(tmp_path, encoded, per_tar=6), np.arange(6)
    data = Data(image_size=32, crop="src", crop_padding=0, hflip=0.0, threads=1)
    whole = [np.asarray(reference.decode(image).resize((32, 32), Image.Resampling.BICUBIC)) for image in encoded]
    for view in ("pretrain_mae", "pretrain_lut"):
        for crop in ("src", "rrc"):
            cropped = dataclasses.replace(data, crop=crop)
            with EvaluationLoader(dataset, ids, data=cropped, batch=6, device=torch.device("cpu"), view=view) as loader:
                (batch,) = loader
            levels = bytes_of(batch.views[0].numpy(), cropped).transpose(0, 2, 3, 1)
            difference = level_difference(levels, whole)
            assert difference.max() < 0.5 if crop == "src" else difference.min() > 2, (view, crop, difference)


# --- the draws ------------------------------------------------------------------------------------------------------

NUM = 20_000


def test_jitter_follows_its_law() -> None:
    """Probability, uniform factors, and all 24 orders equally often."""
    drawn = draws.jitters(LUT, 0, 0, np.arange(NUM))
    jittered = drawn["order"][:, 0] != Jitter.NONE
    assert jittered.mean() == pytest.approx(0.8, abs=0.013)
    counts = Counter(map(tuple, drawn["order"][jittered].tolist()))
    assert len(counts) == 24 and all(sorted(order) == [0, 1, 2, 3] for order in counts)
    expected = jittered.sum() / 24
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 49.7  # chi square, 23, 0.1 %
    assert set(drawn["order"][~jittered].ravel().tolist()) == {Jitter.NONE}
    for name, strength in (("brightness", 0.4), ("contrast", 0.4), ("saturation", 0.2)):
        share = (drawn[name] - (1 - strength)) / (2 * strength)
        grid = np.linspace(0, 1, 101)
        found = np.searchsorted(np.sort(share), grid) / NUM
        assert drawn[name].dtype == np.float32 and np.abs(found - grid).max() < 1.95 / np.sqrt(NUM)
    turns = drawn["hue"].astype(float) * 255 / 6  # in 1/255 of the circle: truncated, so 0 is twice as frequent
    np.testing.assert_allclose(turns, turns.round(), atol=1e-5)
    counts = Counter(turns.round().astype(int).tolist())
    assert set(counts) == set(range(-25, 26)) and counts[0] > 1.5 * counts[1]
    assert abs(turns.mean()) < 4.5 * turns.std() / np.sqrt(NUM)
    assert np.abs(np.corrcoef([drawn[name] for name in OPERATIONS]) - np.eye(4)).max() < 4.5 / np.sqrt(NUM)


def test_effects_follow_their_law() -> None:
    drawn = draws.effects(0, 0, np.arange(NUM), (0.1, 2.0))
    counts = np.bincount(drawn["effect"])
    assert len(counts) == 3 and np.abs(counts / NUM - 1 / 3).max() < 4.5 * np.sqrt(2 / 9 / NUM)
    sigma = drawn["sigma"][:, 0]
    assert 0.1 <= sigma.min() and sigma.max() <= np.float32(2)
    assert sigma.mean() == pytest.approx(1.05, abs=4.5 * 0.55 / np.sqrt(NUM))


def test_simple_crops_are_uniform_and_the_views_independent() -> None:
    """shorter side: 0 ... 2 padding; longer side: 0 ... resized + 2 padding - size. Every place equally often."""
    ids, height, width = np.arange(NUM), np.full(NUM, 40), np.full(NUM, 52)
    drawn = draws.pretrain_lut(LUT, 0, 0, ids, height, width)
    assert (drawn["resized"] == [32, 41]).all()
    tops_and_lefts = [drawn["corner" + ending] for ending in ("", draws.SECOND)]
    for corners in tops_and_lefts:
        for column, places in zip(corners.T, (9, 18), strict=True):
            counts = np.bincount(column)
            assert len(counts) == places
            assert np.abs(counts - NUM / places).max() < 4.5 * np.sqrt(NUM / places)
    columns = [*tops_and_lefts[0].T, *tops_and_lefts[1].T, drawn["mirror"], drawn["mirror" + draws.SECOND]]
    assert np.abs(np.corrcoef(np.array(columns)) - np.eye(6)).max() < 4.5 / np.sqrt(NUM)
    assert (drawn["mirror"] == draws.flips(0, 0, ids, 0.5)).all()


def test_both_views_of_the_other_crop_are_independent() -> None:
    ids = np.arange(2000)
    drawn = draws.pretrain_lut(dataclasses.replace(LUT, crop="rrc"), 0, 0, ids, np.full(2000, 375), np.full(2000, 500))
    areas = [drawn["shape" + ending].prod(1) for ending in ("", draws.SECOND)]
    assert abs(np.corrcoef(areas)[0, 1]) < 4.5 / np.sqrt(2000)
    assert areas[0].mean() == pytest.approx(areas[1].mean(), rel=0.05)


@pytest.mark.parametrize("crop", ["src", "rrc"])
def test_a_shared_crop_takes_the_second_framing_away_and_nothing_else(crop: str) -> None:
    apart, shared = (
        draws.pretrain_lut(
            dataclasses.replace(LUT, crop=crop, shared_crop=share),
            3,
            1,
            np.arange(50),
            np.full(50, 300),
            np.full(50, 400),
        )
        for share in (False, True)
    )
    assert {name for name in apart if name.endswith(draws.SECOND)} == apart.keys() - shared.keys() != set()
    for name, values in shared.items():
        np.testing.assert_array_equal(values, apart[name])


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=30, unique=True).map(np.array), st.data())
@settings(max_examples=30)
def test_draws_do_not_depend_on_the_batch(ids: np.ndarray, data: st.DataObject) -> None:
    part = np.array(data.draw(st.permutations(range(len(ids)))))[: max(1, len(ids) // 2)]
    height, width = 40 + ids % 400, 50 + ids % 300
    whole = draws.pretrain_lut(LUT, 5, 3, ids, height, width)
    alone = draws.pretrain_lut(LUT, 5, 3, ids[part], height[part], width[part])
    for name, values in whole.items():
        assert values.flags.c_contiguous and len(values) == len(ids)
        np.testing.assert_array_equal(values[part], alone[name])


def test_extreme_image_is_squeezed_not_blown_up() -> None:
    """8000 x 2 pixels with the shorter side at 224 would be 896,000 pixels long."""
    drawn = draws.framing(Data(crop="src"), 0, 0, np.arange(1), np.array([2]), np.array([8000]))
    assert drawn["resized"].tolist() == [[224, 32 * 224]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"brightness": 1.5}, "data.brightness=1.5: a strength"),
        ({"hue": 0.3}, "data.hue=0.3: a share of the circle in"),
        ({"jitter_prob": 2.0}, "data.jitter_prob=2.0: a probability"),
        ({"crop_padding": 32}, "data.crop_padding=32: 0 to data.image_size - 1 = 31"),
        ({"blur_sigma": (0.0, 1.0)}, r"data.blur_sigma=\(0.0, 1.0\): 0 < low"),
        ({"solarize_threshold": 256}, "data.solarize_threshold=256: a level"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(LUT, **change)
