"""The random part of an augmentation: numpy functions of (seed, epoch, sample id), vectorised over the batch.

Nothing here knows a rank, a batch size or a moment, so a sample looks the same wherever and whenever it is drawn.
`pretrain_mae` and `evaluate` at the end collect what the graph of the same name (graphs.py) and its reference
(reference.py) need per sample; each returns a dict of C-contiguous arrays with one row per sample. Image sizes come
from the index: no image is opened here.
"""

from __future__ import annotations

import numpy as np

from recipes.schema import Data
from shards.philox import Stream, words

Draws = dict[str, np.ndarray]

_TRIES = 10


def uniforms(seed: int, epoch: int, ids: np.ndarray, stream: Stream, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for each id: float32 [B, count], multiples of 2**-24."""
    return (words(seed, epoch, ids, stream, count) >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def mask_noise(seed: int, epoch: int, ids: np.ndarray, count: int) -> np.ndarray:
    """The draws of a mask, one number in [0, 1) per patch: float32 [B, count]."""
    return uniforms(seed, epoch, ids, Stream.MASK, count)


def flips(seed: int, epoch: int, ids: np.ndarray, probability: float) -> np.ndarray:
    """1 where the image is mirrored left to right, else 0: int32 [B]."""
    return (uniforms(seed, epoch, ids, Stream.FLIP, 1)[:, 0] < probability).astype(np.int32)


def resized_crops(
    seed: int,
    epoch: int,
    ids: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Random resized crop: (top, left, height, width) in pixels for each image, int32 [B, 4].

    The law of torchvision's RandomResizedCrop: up to ten tries of an area, uniform in `scale` x the image's area, and
    of an aspect (width / height), log-uniform in `ratio`; the first box that fits is placed uniformly. If none fits,
    the largest centred box whose aspect is in `ratio`. The box never leaves the image and has at least one pixel.
    """
    draw = uniforms(seed, epoch, ids, Stream.CROP, 2 * _TRIES + 2).astype(np.float64)
    height, width = np.asarray(height, np.int64), np.asarray(width, np.int64)
    area = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * draw[:, :_TRIES])
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * draw[:, _TRIES : 2 * _TRIES])
    tried_w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    tried_h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (tried_w > 0) & (tried_w <= width[:, None]) & (tried_h > 0) & (tried_h <= height[:, None])
    found, rows, first = fits.any(1), np.arange(len(ids)), fits.argmax(1)
    centred_h, centred_w = _largest_box(height, width, ratio)
    crop_h = np.where(found, tried_h[rows, first], centred_h)
    crop_w = np.where(found, tried_w[rows, first], centred_w)
    spare_h, spare_w = height - crop_h, width - crop_w
    top = np.where(found, np.floor(draw[:, -2] * (spare_h + 1)).astype(np.int64), spare_h // 2)
    left = np.where(found, np.floor(draw[:, -1] * (spare_w + 1)).astype(np.int64), spare_w // 2)
    return np.stack([top, left, crop_h, crop_w], 1).astype(np.int32)


def _largest_box(height: np.ndarray, width: np.ndarray, ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Height and width of the largest box with an aspect inside `ratio`; at least one pixel, at most the image."""
    box_h = np.where(width < height * ratio[0], np.rint(width / ratio[0]), height)
    box_w = np.where(width > height * ratio[1], np.rint(height * ratio[1]), width)
    return np.clip(box_h, 1, height).astype(np.int64), np.clip(box_w, 1, width).astype(np.int64)


def centre_crops(
    height: np.ndarray, width: np.ndarray, image_size: int, eval_crop: float
) -> tuple[np.ndarray, np.ndarray]:
    """Evaluation geometry: the whole image's size after the resize, and the crop's top left corner in it.

    Returns (resized [B, 2], corner [B, 2]), both int32 and (vertical, horizontal). torchvision's integer rules: the
    shorter side becomes int(image_size / eval_crop), the longer side is truncated, and the centre is rounded half to
    even (`Resize`, `CenterCrop`).
    """
    shorter = int(image_size / eval_crop)
    size = np.stack([height, width], 1).astype(np.int64)
    resized = shorter * size // size.min(1, keepdims=True)
    corner = np.rint((resized - image_size) / 2)
    return resized.astype(np.int32), corner.astype(np.int32)


def pretrain_mae(data: Data, seed: int, epoch: int, ids: np.ndarray, height: np.ndarray, width: np.ndarray) -> Draws:
    """MAE's augmentation (He et al., 2021, appendix A.1): random resized crop and horizontal flip.

    `corner` and `shape` [B, 2] int32 (vertical, horizontal) in pixels of the image as stored, `mirror` [B] int32.
    """
    boxes = resized_crops(seed, epoch, ids, height, width, data.scale, data.ratio)
    return {
        "corner": boxes[:, :2].copy(),
        "shape": boxes[:, 2:].copy(),
        "mirror": flips(seed, epoch, ids, data.hflip),
    }


def evaluate(data: Data, seed: int, epoch: int, ids: np.ndarray, height: np.ndarray, width: np.ndarray) -> Draws:
    """Evaluation: nothing is drawn, so `seed`, `epoch` and `ids` change nothing.

    `size` [B, 2] of the image as stored, `resized` and `corner` [B, 2] of `centre_crops`; int32, (vertical,
    horizontal), in pixels.
    """
    resized, corner = centre_crops(height, width, data.image_size, data.eval_crop)
    return {"size": np.stack([height, width], 1).astype(np.int32), "resized": resized, "corner": corner}
