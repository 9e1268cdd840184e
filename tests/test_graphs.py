"""DALI's graphs against PIL on the same draws, over the kinds of image that people have."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from images import encode, jpeg_bytes, smooth_picture
from PIL import Image
from tars import make_dataset

from recipes.schema import Data
from shards.augment import resizing
from shards.augment.views import VIEWS, find_view
from shards.dataset import Dataset
from shards.reading.loader import EvaluationLoader

DATA = Data(image_size=96, threads=1)
SIMPLE = dataclasses.replace(DATA, crop="src")
# The geometry of every view: colours are left as they are here (test_views_lut.py, test_views_dtm.py).
CASES = {
    "mae": ("pretrain_mae", DATA),
    "mae, simple crop": ("pretrain_mae", SIMPLE),
    "lut": ("pretrain_lut", SIMPLE),
    "lut, random resized crop": ("pretrain_lut", DATA),
    "dtm": ("pretrain_dtm", DATA),
    "evaluate": ("evaluate", DATA),
}


def picture(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    return smooth_picture(np.random.default_rng(seed), width, height).convert(mode)


def rotated_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    return encode(picture(7, 150, 90), exif=exif)


IMAGES = {
    "4:2:0": jpeg_bytes(1, 151, 117, subsampling=2),
    "4:4:4": jpeg_bytes(2, 160, 120, subsampling=0),
    "4:2:2 odd": jpeg_bytes(3, 133, 201, subsampling=1),
    "progressive": jpeg_bytes(4, 140, 140, progressive=True),
    "gray": encode(picture(5, 128, 99, "L")),
    "cmyk": encode(picture(6, 128, 99, "CMYK"), quality=90),
    "exif": rotated_exif(),
    "png": encode(picture(8, 101, 77), "PNG"),
    "png gray": encode(picture(9, 101, 77, "L"), "PNG"),
    "png alpha": encode(picture(10, 101, 77, "RGBA"), "PNG"),
    "png palette": encode(picture(11, 101, 77, "P"), "PNG"),
    "webp": encode(picture(12, 160, 100), "WEBP", quality=90),
    "large": jpeg_bytes(13, 800, 600),
    "1 x 1": jpeg_bytes(14, 1, 1),
    "3 x 2": jpeg_bytes(15, 3, 2),
    "flat": jpeg_bytes(16, 900, 4),
    "tall": jpeg_bytes(17, 2, 300),
    "tall png": encode(picture(18, 1, 200), "PNG"),
}


@pytest.fixture(scope="module")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("varied"), list(IMAGES.values()), per_tar=7)


@pytest.fixture(scope="module", params=list(CASES))
def both(request: pytest.FixtureRequest, varied: Dataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first view of every image three times over, through DALI and PIL: [M, 3, S, S] in levels of 255."""
    view, data = CASES[request.param]
    ids = np.tile(np.arange(len(varied)), 3)
    with EvaluationLoader(
        varied, ids, data=data, batch=16, device=torch.device("cpu"), view=view, check_sources=True
    ) as loader:
        served = torch.cat([batch.views[0] for batch in loader]).numpy()
    expected = VIEWS[view].referenced(varied, data, 0, 0, ids)[0]
    levels = 255 * np.float32(DATA.std).reshape(3, 1, 1)
    yield served * levels, expected * levels


def test_graph_agrees_with_pil(both: tuple[np.ndarray, np.ndarray]) -> None:
    """Mean absolute difference of each image, in levels of 255; everything but `flat` is at 0.6 or less.

    `flat` is four high-contrast rows blown up 24 times: there DALI's tabulated filter is up to 7 levels off.
    """
    difference = np.abs(both[0] - both[1]).mean((1, 2, 3)).reshape(3, -1).max(0)
    limits = {name: 1.2 if name == "flat" else 0.6 for name in IMAGES}
    found = dict(zip(IMAGES, difference.tolist(), strict=True))
    assert {name: value for name, value in found.items() if value > limits[name]} == {}
    assert np.mean(difference) < 0.35


@pytest.mark.parametrize("case", ["mae", "lut", "evaluate"])
def test_the_resize_of_a_gpu_agrees_with_pil(case: str, varied: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph as a GPU has it, by DALI's own resize, run with DALI's CPU operators; limits as above."""
    monkeypatch.setattr(resizing, "by_dali", lambda images: True)
    monkeypatch.setattr(resizing, "resize", None)  # nobody calls it
    (view, data), ids = CASES[case], np.arange(len(varied))
    with EvaluationLoader(varied, ids, data=data, batch=18, device=torch.device("cpu"), view=view) as loader:
        (batch,) = loader
    expected = VIEWS[view].referenced(varied, data, 0, 0, ids)[0]
    difference = np.abs(batch.views[0].numpy() - expected).mean((1, 2, 3)) * 255 * np.mean(DATA.std)
    limits = np.array([1.2 if name == "flat" else 0.6 for name in IMAGES])
    assert (difference <= limits).all(), dict(zip(IMAGES, difference.round(2), strict=True))


@pytest.mark.parametrize("size", [(224, 224), (256, 341), (300, 300), (700, 90), (1, 1), (3, 500)])
def test_torch_resizes_as_pil(size: tuple[int, int]) -> None:
    """To two levels, and that seldom: 8-bit arithmetic with the same filter. Of black and white dots, which clip, too.

    In two passes, width first: of one call newer versions of Pillow may take the height first.
    """
    for seed, (width, height) in enumerate([(500, 375), (375, 500), (90, 240), (1, 1), (2, 300), (224, 224)]):
        image = np.array(picture(seed, width, height))
        for pixels in (image, image % 2 * np.uint8(255)):
            expected = Image.fromarray(pixels).resize((size[1], height), Image.Resampling.BICUBIC)
            expected = np.asarray(expected.resize(size[::-1], Image.Resampling.BICUBIC))
            difference = np.abs(resizing.resize(pixels, size).astype(int) - expected)
            assert difference.max() <= 2 and difference.mean() < 0.25, (width, height, difference.max())


def test_both_ways_to_a_crop_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut out of the whole, or computed alone for an image that is too long; a wrong place would be far off."""
    image, whole, size, corner = np.array(picture(0, 500, 375)), (375, 500), (256, 341), (16, 58)
    cut = resizing.resize_crop(image, whole, size, corner, 224)
    monkeypatch.setattr(resizing, "_LONGEST", 0)
    monkeypatch.setattr(resizing, "resize", None)
    alone = resizing.resize_crop(image, whole, size, corner, 224)
    assert cut.shape == alone.shape == (224, 224, 3) and np.abs(cut.astype(int) - alone).max() <= 2
    beside = resizing.resize_crop(image, whole, size, (17, 60), 224)
    assert np.abs(beside.astype(int) - alone).max() > 5


def test_images_differ_from_each_other(both: tuple[np.ndarray, np.ndarray]) -> None:
    means = both[0][: len(IMAGES)].mean((2, 3))
    assert len(np.unique(means.round(3), axis=0)) == len(IMAGES)


def test_flipped_and_unflipped_samples_are_both_seen(varied: Dataset) -> None:
    drawn = VIEWS["pretrain_mae"].drawn(varied, DATA, 0, 0, np.arange(len(varied)))
    assert set(drawn["mirror"].tolist()) == {0, 1}


def test_extreme_image_is_not_blown_up(tmp_path: Path) -> None:
    """8000 x 2 pixels, resized whole, would be 1,024,000 x 256; only the crop is computed."""
    dataset = make_dataset(tmp_path, [jpeg_bytes(1, 8000, 2)], per_tar=1)
    with EvaluationLoader(dataset, np.zeros(1), data=Data(), batch=1, device=torch.device("cpu")) as loader:
        (batch,) = loader
    assert batch.views[0].shape == (1, 3, 224, 224)
    # The crop is 1.75 pixels of the middle, so it is nearly constant along its width.
    assert (batch.views[0].amax(3) - batch.views[0].amin(3)).max() < 0.5


def test_unknown_view_lists_the_names() -> None:
    with pytest.raises(ValueError, match="view=mae: not known; choose one of pretrain_mae, pretrain_lut, "):
        find_view("mae")
