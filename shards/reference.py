"""The contract of the graphs in plain Python: seek, read, PIL. DALI is tested against this.

Slow and obvious on purpose: one image at a time, crop or resize as one would write it by hand. The functions bear the
names of the graphs (graphs.py) and take one sample's row of the draws (draws.py).
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from recipes.schema import Data
from shards.dataset import Dataset
from shards.draws import Draws


def read_image(dataset: Dataset, sample_id: int) -> bytes:
    """The encoded image of a sample. ValueError naming it if the tar ends before the image does."""
    offset, size = int(dataset.offset[sample_id]), int(dataset.size[sample_id])
    with open(dataset.paths[dataset.tar[sample_id]], "rb") as tar:
        tar.seek(offset)
        encoded = tar.read(size)
    if len(encoded) != size:
        raise ValueError(
            f"{dataset.name(sample_id)}: {len(encoded)} of {size} bytes at offset {offset}; the tar is shorter than "
            "its index says, so index the shards again"
        )
    return encoded


def decode(encoded: bytes) -> Image.Image:
    """The image as RGB, not rotated by EXIF."""
    with Image.open(io.BytesIO(encoded)) as image:
        return image.convert("RGB")


def _normalise(image: Image.Image, data: Data) -> np.ndarray:
    """float32 [3, S, S], by the mean and standard deviation of pixels in [0, 1]."""
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1) / 255
    mean, std = (np.float32(values).reshape(3, 1, 1) for values in (data.mean, data.std))
    return (pixels - mean) / std


def pretrain_mae(encoded: bytes, draws: Draws, data: Data) -> tuple[np.ndarray, ...]:
    """As `graphs.pretrain_mae`, for one sample: a float32 [3, S, S]."""
    (top, left), (height, width) = draws["corner"].tolist(), draws["shape"].tolist()
    crop = decode(encoded).crop((left, top, left + width, top + height))
    image = crop.resize((data.image_size, data.image_size), Image.Resampling.BICUBIC)
    if draws["mirror"]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return (_normalise(image, data),)


def evaluate(encoded: bytes, draws: Draws, data: Data) -> tuple[np.ndarray, ...]:
    """As `graphs.evaluate`, for one sample: a float32 [3, S, S]."""
    (height, width), (top, left) = draws["resized"].tolist(), draws["corner"].tolist()
    image = decode(encoded).resize((width, height), Image.Resampling.BICUBIC)
    crop = image.crop((left, top, left + data.image_size, top + data.image_size))
    return (_normalise(crop, data),)
