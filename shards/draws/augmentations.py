"""The random part of an augmentation: numpy functions of (seed, epoch, sample id), vectorised over the batch.

Nothing here knows a rank, a batch size or a moment, so a sample looks the same wherever and whenever it is drawn.
First the laws: crops, flips, jitter, effects. The functions at the end, named like the views, collect what the graph
of the same name (graphs.py) and its reference (reference.py) need per sample; each returns a dict of C-contiguous
arrays with one row per sample. Image sizes come from the index: no image is opened here.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from recipes.schema import Data
from shards.draws.philox import Stream, words

Draws = dict[str, np.ndarray]

SECOND = "_2"  # ends the names of the second image's draws

_TRIES = 10
_BLURS = (  # sigma for PIL, and for the sampled Gaussian whose weights are nearest to those of PIL's three box filters
    (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1),
    (0.1, 0.3, 0.358, 0.381, 0.404, 0.427, 0.452, 0.477, 0.505, 0.567, 0.644, 0.738, 0.851, 0.98, 1.1),
)
_LONGEST = 32  # simple resized crop: the longer side is at most so many times the shorter


class Jitter(IntEnum):
    """The operations of colour jitter, as `order` names them."""

    NONE = -1
    BRIGHTNESS = 0
    CONTRAST = 1
    SATURATION = 2
    HUE = 3


class Effect(IntEnum):
    """What the second image of LUT becomes after the jitter."""

    GRAY = 0
    SOLARIZE = 1
    BLUR = 2


def uniforms(seed: int, epoch: int, ids: np.ndarray, stream: Stream, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for each id: float32 [B, count], multiples of 2**-24."""
    return (words(seed, epoch, ids, stream, count) >> np.uint32(8)).astype(np.float32) * np.float32(2**-24)


def mask_noise(seed: int, epoch: int, ids: np.ndarray, count: int) -> np.ndarray:
    """The draws of a mask, one number in [0, 1) per patch: float32 [B, count]."""
    return uniforms(seed, epoch, ids, Stream.MASK, count)


def flips(seed: int, epoch: int, ids: np.ndarray, probability: float, image: int = 0) -> np.ndarray:
    """1 where the image is mirrored left to right, else 0: int32 [B]. `image` 0, 1, ...: independent flips."""
    return (uniforms(seed, epoch, ids, Stream.FLIP, image + 1)[:, image] < probability).astype(np.int32)


def resized_crops(
    seed: int,
    epoch: int,
    ids: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    image: int = 0,
) -> np.ndarray:
    """Random resized crop: (top, left, height, width) in pixels for each image, int32 [B, 4].

    The law of torchvision's RandomResizedCrop: up to ten tries of an area, uniform in `scale` x the image's area, and
    of an aspect (width / height), log-uniform in `ratio`; the first box that fits is placed uniformly. If none fits,
    the largest centred box whose aspect is in `ratio`. The box never leaves the image and has at least one pixel.
    `image` 0, 1, ...: independent crops of the same sample.
    """
    count = 2 * _TRIES + 2
    draw = uniforms(seed, epoch, ids, Stream.CROP, (image + 1) * count)[:, image * count :].astype(np.float64)
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


def simple_crops(
    seed: int, epoch: int, ids: np.ndarray, resized: np.ndarray, padding: int, image_size: int, image: int = 0
) -> np.ndarray:
    """Simple resized crop: the top left corner, uniform in the resized image with `padding` at each side.

    int32 [B, 2], (vertical, horizontal); `resized` [B, 2] likewise. `image` 0, 1, ...: independent crops.
    """
    draw = uniforms(seed, epoch, ids, Stream.CROP, 2 * (image + 1))[:, 2 * image :].astype(np.float64)
    places = resized.astype(np.int64) + 2 * padding - image_size + 1
    return np.floor(draw * places).astype(np.int32)


def _shorter_to(shorter: int, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Sizes [B, 2] int64 (vertical, horizontal) whose shorter side is `shorter`, the longer truncated (torchvision)."""
    size = np.stack([height, width], 1).astype(np.int64)
    return shorter * size // size.min(1, keepdims=True)


def centre_crops(
    height: np.ndarray, width: np.ndarray, image_size: int, eval_crop: float
) -> tuple[np.ndarray, np.ndarray]:
    """Evaluation geometry: the whole image's size after the resize, and the crop's top left corner in it.

    Returns (resized [B, 2], corner [B, 2]), both int32 and (vertical, horizontal). torchvision's integer rules: the
    shorter side becomes int(image_size / eval_crop), the longer side is truncated, and the centre is rounded half to
    even (`Resize`, `CenterCrop`).
    """
    shorter = int(image_size / eval_crop)
    resized = _shorter_to(shorter, height, width)
    corner = np.rint((resized - image_size) / 2)
    return resized.astype(np.int32), corner.astype(np.int32)


def jitters(data: Data, seed: int, epoch: int, ids: np.ndarray) -> Draws:
    """Colour jitter after torchvision's `ColorJitter` inside a `RandomApply` of probability data.jitter_prob.

    For each of the n operations that have a strength, its name in small letters: float32 [B], a factor, uniform in
    1 -+ strength; for `hue` a shift in sixths of the colour circle, and a whole number of 1/255 turns, truncated
    towards zero as PIL's 8-bit hue demands. `order` [B, n] int32: these operations (`Jitter`) in uniformly random
    order, or all NONE. Without strengths there is nothing.
    """
    strengths = (data.brightness, data.contrast, data.saturation, data.hue)
    active = np.flatnonzero(strengths).astype(np.int32)
    if not len(active):
        return {}
    draw = uniforms(seed, epoch, ids, Stream.JITTER, 1 + 2 * len(strengths))
    shifts = (2 * draw[:, 1:5].astype(np.float64) - 1) * np.array(strengths)
    values = 1 + shifts
    values[:, Jitter.HUE] = np.trunc(255 * shifts[:, Jitter.HUE]) * (6 / 255)
    order = active[draw[:, 5:][:, active].argsort(1, kind="stable")]
    order[draw[:, 0] >= data.jitter_prob] = Jitter.NONE
    return {"order": order, **{Jitter(op).name.lower(): values[:, op].astype(np.float32) for op in active}}


def effects(seed: int, epoch: int, ids: np.ndarray, blur_sigma: tuple[float, float]) -> Draws:
    """What becomes of an image: `effect` [B] int32, one of `Effect` at equal chances, and `sigma` [B, 2] float32.

    The latter is a blur's standard deviation in pixels, uniform: as PIL is given it, and for a true Gaussian to agree.
    """
    draw = uniforms(seed, epoch, ids, Stream.EFFECT, 2)
    low, high = blur_sigma
    return {
        "effect": (draw[:, 0] * np.float32(len(Effect))).astype(np.int32),
        "sigma": sigmas(low + (high - low) * draw[:, 1]),
    }


def sigmas(pil: np.ndarray) -> np.ndarray:
    """PIL's sigmas [B] beside those of the sampled Gaussians that look alike: float32 [B, 2]. Equal from 1.1 on."""
    return np.stack([pil, np.where(pil < _BLURS[0][-1], np.interp(pil, *_BLURS), pil)], 1).astype(np.float32)


def framing(
    data: Data, seed: int, epoch: int, ids: np.ndarray, height: np.ndarray, width: np.ndarray, image: int = 0
) -> Draws:
    """Which part of a sample is shown, by data.crop, and whether it is mirrored. Pairs are (vertical, horizontal).

    `mirror` [B] int32. rrc: `corner` and `shape` [B, 2] int32 in pixels of the image as stored. src: `resized` [B, 2]
    int32, the size after the resize, and `corner` in the resized and padded image. `image`: as in `resized_crops`.
    """
    mirror = flips(seed, epoch, ids, data.hflip, image)
    if data.crop == "rrc":
        boxes = resized_crops(seed, epoch, ids, height, width, data.scale, data.ratio, image)
        return {"corner": boxes[:, :2].copy(), "shape": boxes[:, 2:].copy(), "mirror": mirror}
    # An image of 8000 x 2 pixels would become one of 896,000 x 224: half a gigabyte. So long a one is squeezed.
    resized = np.minimum(_shorter_to(data.image_size, height, width), _LONGEST * data.image_size).astype(np.int32)
    corner = simple_crops(seed, epoch, ids, resized, data.crop_padding, data.image_size, image)
    return {"resized": resized, "corner": corner, "mirror": mirror}


def pretrain_mae(data: Data, seed: int, epoch: int, ids: np.ndarray, height: np.ndarray, width: np.ndarray) -> Draws:
    """MAE's augmentation (He et al., 2021, appendix A.1): crop and horizontal flip. As `framing`."""
    return framing(data, seed, epoch, ids, height, width)


def pretrain_lut(data: Data, seed: int, epoch: int, ids: np.ndarray, height: np.ndarray, width: np.ndarray) -> Draws:
    """LUT's augmentation (docs/methods.md): two independent crops and flips; the second image jittered and changed.

    As `framing` for the first image and, with names ending in `SECOND`, for the second, which has none of its own with
    data.shared_crop; `jitters`; `effects`.
    """
    second = {} if data.shared_crop else framing(data, seed, epoch, ids, height, width, image=1)
    return {
        **framing(data, seed, epoch, ids, height, width),
        **{name + SECOND: values for name, values in second.items() if name != "resized"},  # they share the resize
        **jitters(data, seed, epoch, ids),
        **effects(seed, epoch, ids, data.blur_sigma),
    }


def pretrain_dtm(data: Data, seed: int, epoch: int, ids: np.ndarray, height: np.ndarray, width: np.ndarray) -> Draws:
    """DTM's augmentation (docs/methods.md): jitter of the whole image, crop, flip. As `jitters` and `framing`."""
    return {**framing(data, seed, epoch, ids, height, width), **jitters(data, seed, epoch, ids)}


def evaluate(data: Data, seed: int, epoch: int, ids: np.ndarray, height: np.ndarray, width: np.ndarray) -> Draws:
    """Evaluation: nothing is drawn, so `seed`, `epoch` and `ids` change nothing.

    `size` [B, 2] of the image as stored, `resized` and `corner` [B, 2] of `centre_crops`; int32, (vertical,
    horizontal), in pixels.
    """
    resized, corner = centre_crops(height, width, data.image_size, data.eval_crop)
    return {"size": np.stack([height, width], 1).astype(np.int32), "resized": resized, "corner": corner}
