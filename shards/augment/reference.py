"""The contract of the graphs in plain Python: seek, read, PIL. DALI is tested against this.

Slow and obvious on purpose: one image at a time, every step as one would write it by hand and in the order of the
released programs. The functions bear the names of the graphs (graphs.py) and take one sample's row of the draws
(shards/draws/augmentations.py).
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from recipes.schema import Data
from shards.dataset import Dataset
from shards.draws.augmentations import SECOND, Draws, Effect, Jitter


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
    return (_normalise(framed(decode(encoded), draws, data), data),)


def pretrain_lut(encoded: bytes, draws: Draws, data: Data) -> tuple[np.ndarray, ...]:
    """As `graphs.pretrain_lut`, for one sample: two float32 [3, S, S].

    What the second has no draw of its own for (data.shared_crop) it shares with the first.
    """
    image = decode(encoded)
    second = {**draws, **{name.removesuffix(SECOND): row for name, row in draws.items() if name.endswith(SECOND)}}
    strong = changed(jittered(framed(image, second, data), draws), draws, data.solarize_threshold)
    return _normalise(framed(image, draws, data), data), _normalise(strong, data)


def pretrain_dtm(encoded: bytes, draws: Draws, data: Data) -> tuple[np.ndarray, ...]:
    """As `graphs.pretrain_dtm`, for one sample: a float32 [3, S, S]."""
    return (_normalise(framed(jittered(decode(encoded), draws), draws, data), data),)


def framed(image: Image.Image, draws: Draws, data: Data) -> Image.Image:
    """Cropped and mirrored, S x S. Draws as `shards.draws.augmentations.framing` makes them."""
    side = data.image_size
    top, left = draws["corner"].tolist()
    if data.crop == "rrc":
        height, width = draws["shape"].tolist()
        crop = image.crop((left, top, left + width, top + height)).resize((side, side), Image.Resampling.BICUBIC)
    else:
        height, width = draws["resized"].tolist()
        resized = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
        border = (data.crop_padding, data.crop_padding)
        padded = np.pad(resized, (border, border, (0, 0)), mode="reflect")
        crop = Image.fromarray(padded[top : top + side, left : left + side])
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws["mirror"] else crop


def jittered(image: Image.Image, draws: Draws) -> Image.Image:
    """Colour jitter with one sample's row of `shards.draws.augmentations.jitters`."""
    for operation in draws["order"].tolist() if "order" in draws else ():
        if operation == Jitter.BRIGHTNESS:
            image = ImageEnhance.Brightness(image).enhance(float(draws["brightness"]))
        elif operation == Jitter.CONTRAST:
            image = ImageEnhance.Contrast(image).enhance(float(draws["contrast"]))
        elif operation == Jitter.SATURATION:
            image = ImageEnhance.Color(image).enhance(float(draws["saturation"]))
        elif operation == Jitter.HUE:
            image = hue_turned(image, float(draws["hue"]))
    return image


def hue_turned(image: Image.Image, sixths: float) -> Image.Image:
    """The hue turned in PIL's 8-bit HSV, where 255 is a whole turn (torchvision's adjust_hue)."""
    hue, saturation, value = image.convert("HSV").split()
    shifted = (np.asarray(hue, np.int64) + round(sixths * 255 / 6)) % 256
    return Image.merge("HSV", (Image.fromarray(shifted.astype(np.uint8)), saturation, value)).convert("RGB")


def changed(image: Image.Image, draws: Draws, threshold: int) -> Image.Image:
    """Gray, solarized or blurred, with one sample's row of `shards.draws.augmentations.effects`."""
    if draws["effect"] == Effect.GRAY:
        return image.convert("L").convert("RGB")
    if draws["effect"] == Effect.SOLARIZE:
        return ImageOps.solarize(image, threshold)
    return image.filter(ImageFilter.GaussianBlur(float(draws["sigma"][0])))


def evaluate(encoded: bytes, draws: Draws, data: Data) -> tuple[np.ndarray, ...]:
    """As `graphs.evaluate`, for one sample: a float32 [3, S, S]."""
    (height, width), (top, left) = draws["resized"].tolist(), draws["corner"].tolist()
    image = decode(encoded).resize((width, height), Image.Resampling.BICUBIC)
    crop = image.crop((left, top, left + data.image_size, top + data.image_size))
    return (_normalise(crop, data),)
