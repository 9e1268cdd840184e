"""Colour operations of the released programs (PIL on 8-bit images) as DALI graphs over uint8 RGB in HWC layout.

Every operation rounds and clamps to 8 bits, as PIL does, so that the order of a jitter matters as it does there.
DALI's own operators are used where they mean the same; its contrast (about 128), hue (a rotation in YIQ) and
saturation (six times slower) do not. On a CPU, DALI runs one operation over the whole batch before the next, so memory
traffic decides: intermediate values are 8 or 16 bits wide, and a conversion from float, four times the price of an
addition, is avoided.

A branch (`if` on a draw, for which the pipeline needs `enable_conditionals`) splits the batch: an operation sees only
the samples that need it.
"""

from __future__ import annotations

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.data_node import DataNode

from shards.draws.augmentations import Effect, Jitter

Nodes = dict[str, DataNode]

_TRUNCATE = -0.498  # levels; PIL cuts off where DALI rounds. Not -0.5: a whole number must stay what it is
_LEVELS = {types.UINT8: 255.0, types.INT16: 32767.0}  # what a brightness_shift of 1 means


def jitter(images: DataNode, draws: Nodes, first_row: int = 0) -> DataNode:
    """The operations that `draws` has factors for, in the order of `draws["order"]` (`augmentations.jitters`).

    Contrast keeps the mean gray of the rows from `first_row` on.
    """
    operations = [operation for operation in Jitter if operation.name.lower() in draws]
    for stage in range(len(operations)):
        chosen = draws["order"][stage]
        for operation in operations:
            if chosen == int(operation):
                images = adjusted(images, operation, draws[operation.name.lower()], first_row)
    return images


def adjusted(images: DataNode, operation: Jitter, factor: DataNode, first_row: int) -> DataNode:
    """One operation of the jitter."""
    if operation == Jitter.BRIGHTNESS:
        return _scaled(images, factor, _TRUNCATE)
    if operation == Jitter.CONTRAST:
        return contrast(images, factor, first_row)
    if operation == Jitter.SATURATION:
        return saturation(images, factor)
    return hue(images, factor)


def effect(images: DataNode, draws: Nodes, threshold: int) -> DataNode:
    """Grayscale, solarization at `threshold` or Gaussian blur. Draws as `augmentations.effects` makes them."""
    kind = draws["effect"]
    if kind == int(Effect.GRAY):
        images = gray(images)
    elif kind == int(Effect.SOLARIZE):
        images = solarize(images, threshold)
    else:
        images = fn.gaussian_blur(images, sigma=draws["sigma"][1])
    return images


def contrast(images: DataNode, factor: DataNode, first_row: int = 0) -> DataNode:
    """Distances from the mean gray of the rows from `first_row` on, times `factor` (PIL's ImageEnhance.Contrast).

    The mean stays on the device as an addend: an argument of brightness_contrast would have to be on the CPU.
    """
    mean = fn.reductions.mean(_luma(images[first_row:] if first_row else images), axes=[0, 1], dtype=types.FLOAT)
    rest = fn.cast(mean * _beside(images, 1.0 - factor) + 0.5 * _TRUNCATE, dtype=types.INT16)
    return fn.cast(_scaled(images, factor, 0.5 * _TRUNCATE, types.INT16) + rest, dtype=types.UINT8)


def saturation(images: DataNode, factor: DataNode) -> DataNode:
    """Distances from each pixel's own gray, times `factor` (PIL's ImageEnhance.Color)."""
    colour = _scaled(images, factor, 0.5 * _TRUNCATE, types.INT16)
    return fn.cast(colour + _scaled(gray(images), 1.0 - factor, 0.5 * _TRUNCATE, types.INT16), dtype=types.UINT8)


def hue(images: DataNode, sixths: DataNode) -> DataNode:
    """Hue turned by `sixths` of the circle, -1 ... 1; HSV's saturation and value stay (torchvision's adjust_hue).

    With maximum v, minimum m and chroma c = v - m of a pixel, the distance of its hue from red is
    (g + b - r + v - 2 m) / c sixths, to the side of green where g >= b. A primary at distance d from the turned hue
    has the level m + c (2 - d), within m ... v. All is counted in units of c, so nothing is divided.
    """
    planes = fn.transpose(images, perm=[2, 0, 1], output_layout="CHW")
    r, g, b = planes[0:1], planes[1:2], planes[2:3]
    v, m = math.max(r, math.max(g, b)), math.min(r, math.min(g, b))
    c = v - m
    turn = fn.reshape(_scaled(fn.reshape(c, layout="HWC"), sixths, 0.0, types.INT16), layout="CHW")
    from_red = (fn.cast(g - m, dtype=types.INT16) + (b - m) + (v - r)) * (np.int16(1) - np.int16(2) * (g < b)) + turn
    two = fn.cast(c, dtype=types.INT16) * np.int16(2)
    three, low = two + c, fn.cast(m, dtype=types.INT16) - c
    # Distances beyond half a turn, which are nearer the other way round, are folded back at three sixths.
    levels = (
        two + m - math.abs(from_red),
        low + math.abs(three - math.abs(from_red - two)),
        low + math.abs(three - math.abs(from_red + two)),
    )
    within = [fn.cast(math.min(math.max(level, m), v), dtype=types.UINT8) for level in levels]
    return fn.stack(*[plane[0] for plane in within], axis=2, axis_name="C")


def gray(images: DataNode) -> DataNode:
    """ITU-R 601 luma in all three channels."""
    return fn.color_space_conversion(_luma(images), image_type=types.GRAY, output_type=types.RGB)


def solarize(images: DataNode, threshold: int) -> DataNode:
    """Levels from `threshold` on inverted: 255 - x, which is x with all its bits changed."""
    return images ^ ((images >= np.uint8(threshold)) * np.uint8(255))


def _luma(images: DataNode) -> DataNode:
    return fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)


def _scaled(images: DataNode, factor: DataNode, plus: float, dtype: types.DALIDataType = types.UINT8) -> DataNode:
    """uint8 levels x `factor` + `plus`, rounded and clamped to `dtype`, in one pass."""
    return fn.brightness_contrast(images, brightness=factor, brightness_shift=plus / _LEVELS[dtype], dtype=dtype)


def _beside(images: DataNode, scalar: DataNode) -> DataNode:
    """A per-sample number on the device where `images` are: arithmetic takes no other."""
    return scalar.gpu() if images.device == "gpu" else scalar
