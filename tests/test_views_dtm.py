"""DTM's view: jitter of the whole image before the crop, though only the crop is computed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from images import encode, jpeg_bytes
from operators import pictures
from PIL import Image
from tars import make_dataset

from recipes.schema import Data
from shards.augment.views import VIEWS
from shards.dataset import Dataset
from shards.draws import augmentations as draws
from shards.draws.augmentations import Jitter
from shards.reading.loader import EvaluationLoader

DTM = Data(image_size=64, brightness=0.4, contrast=0.4, saturation=0.4, threads=1)
COPIES = 12  # of every image, so that it is seen under as many draws


def two_halves() -> Image.Image:
    """Dark on the left, bright on the right: a crop's mean gray is not the image's."""
    bright = np.asarray(Image.fromarray(pictures(5, 160)[4]))
    dark = np.asarray(Image.fromarray(pictures(4, 160)[3]))
    return Image.fromarray(np.concatenate([dark, bright], 1))


def grainy() -> Image.Image:
    """As grainy as a photograph in little light; the more grain, the more is clamped before the resize averages."""
    smooth = pictures(1, 140)[0].astype(float)
    noise = np.random.default_rng(0).normal(0, 10, smooth.shape)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


IMAGES = {
    "4:2:0": jpeg_bytes(1, 151, 117, subsampling=2),
    "tall": jpeg_bytes(2, 90, 240),
    "gray": encode(Image.fromarray(pictures(1, 128)[0]).convert("L")),
    "grain": encode(grainy(), "PNG"),
    "halves": encode(two_halves(), quality=95),
    "large": jpeg_bytes(5, 500, 375),
    "small": jpeg_bytes(6, 20, 30),
    "1 x 1": jpeg_bytes(7, 1, 1),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("dtm"), list(IMAGES.values()) * COPIES, per_tar=30)


def served(dataset: Dataset, data: Data) -> np.ndarray:
    """The view of every sample through DALI: [M, 3, S, S]."""
    with EvaluationLoader(
        dataset,
        np.arange(len(dataset)),
        data=data,
        batch=32,
        device=torch.device("cpu"),
        view="pretrain_dtm",
        check_sources=True,
    ) as loader:
        return torch.cat([batch.views[0] for batch in loader]).numpy()


def levels(views: np.ndarray) -> np.ndarray:
    return views * 255 * np.float32(DTM.std).reshape(3, 1, 1)


@pytest.mark.parametrize("crop", ["rrc", "src"])
def test_view_agrees_with_pil(dataset: Dataset, crop: str) -> None:
    """PIL jitters the whole image and then crops. Mean absolute difference of an image, in levels of 255."""
    data = dataclasses.replace(DTM, crop=crop)
    (expected,) = VIEWS["pretrain_dtm"].referenced(dataset, data, 0, 0, np.arange(len(dataset)))
    difference = np.abs(levels(served(dataset, data)) - levels(expected)).mean((1, 2, 3)).reshape(COPIES, -1)
    assert difference.max() <= 2.0, dict(zip(IMAGES, difference.max(0).round(2), strict=True))
    assert difference.mean() < 0.8, difference.mean()


def test_contrast_is_about_the_mean_of_the_whole_image(dataset: Dataset) -> None:
    """Only contrast, on the image of two halves: with the mean of the crop it would be ten levels off."""
    data = dataclasses.replace(DTM, brightness=0.0, saturation=0.0, contrast=0.6, scale=(0.1, 0.2))
    rows = np.flatnonzero(np.arange(len(dataset)) % len(IMAGES) == list(IMAGES).index("halves"))
    drawn = VIEWS["pretrain_dtm"].drawn(dataset, data, 0, 0, np.arange(len(dataset)))
    (expected,) = VIEWS["pretrain_dtm"].referenced(dataset, data, 0, 0, rows)
    ours, plain = served(dataset, data)[rows], served(dataset, dataclasses.replace(data, contrast=0.0))[rows]
    assert np.abs(levels(ours) - levels(expected)).mean((1, 2, 3)).max() <= 1.5
    about_its_own = plain.mean((2, 3), keepdims=True)
    cropped = about_its_own + drawn["contrast"][rows, None, None, None] * (plain - about_its_own)
    assert np.abs(levels(cropped) - levels(expected)).mean((1, 2, 3)).max() > 10


def test_without_strengths_the_view_is_maes(dataset: Dataset) -> None:
    data = Data(image_size=64, threads=1)
    ids = np.arange(len(dataset))
    with EvaluationLoader(dataset, ids, data=data, batch=32, device=torch.device("cpu"), view="pretrain_mae") as loader:
        mae = torch.cat([batch.views[0] for batch in loader]).numpy()
    np.testing.assert_array_equal(served(dataset, data), mae)


def test_order_is_of_the_three_that_have_a_strength() -> None:
    ids = np.arange(6000)
    order = draws.jitters(DTM, 0, 0, ids)["order"]
    found, counts = np.unique(order, axis=0, return_counts=True)
    assert len(found) == 6 and set(order.ravel().tolist()) == {Jitter.BRIGHTNESS, Jitter.CONTRAST, Jitter.SATURATION}
    assert np.abs(counts - 1000).max() < 4.5 * np.sqrt(1000)
    assert draws.jitters(Data(), 0, 0, ids) == {}


def test_crops_are_maes_and_independent_of_the_jitter() -> None:
    ids, height, width = np.arange(3000), np.full(3000, 375), np.full(3000, 500)
    drawn = draws.pretrain_dtm(DTM, 1, 2, ids, height, width)
    mae = draws.pretrain_mae(Data(), 1, 2, ids, height, width)
    assert all((drawn[name] == values).all() for name, values in mae.items())
    columns = [*drawn["corner"].T, drawn["shape"][:, 0], drawn["mirror"], drawn["brightness"], drawn["contrast"]]
    pairs = np.corrcoef(np.array(columns))[:4, 4:]
    assert np.abs(pairs).max() < 4.5 / np.sqrt(3000)
