"""The resize of every graph: bicubic, antialiased, from uint8 to uint8 in HWC layout, as PIL's.

With a GPU it is DALI's own operator. On a CPU that was more than half of the work of a random resized crop (2.5 to 3 ms
from 340 x 300 to 224 x 224 pixels); there torch's is called from within the graph, which takes 0.35 ms, one image after
the other, in one thread. It is 8-bit arithmetic as PIL's, width first, and differs from those two passes of PIL by 2
levels at most. (Pillow 13 takes the height first at some sizes: the same, but for edges that clip.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode
from PIL import Image

_CUBIC = {"interp_type": types.INTERP_CUBIC, "antialias": True}
_LONGEST = 16  # on a CPU a whole image is resized for its crop as long as it has at most so many times the pixels

Size = Sequence[int]  # (height, width)


def resized(images: DataNode, size: DataNode | Size) -> DataNode:
    """Images of `size`: one (height, width) for all, or int32 [2] per sample on the CPU."""
    if by_dali(images):
        return fn.resize(images, size=_float(size) if isinstance(size, DataNode) else size, **_CUBIC)
    if isinstance(size, DataNode):
        return _each(resize, images, size)
    return _each(partial(resize, size=size), images)


def resized_crop(images: DataNode, draws: dict[str, DataNode], side: int) -> DataNode:
    """The crop of `side` x `side` pixels at `corner` of the image at the size `resized`.

    Draws as `shards.draws.augmentations.evaluate` makes them. Of the resized image only the crop is computed, with a
    filter that sees the pixels around it: an image of 8000 x 2 pixels would otherwise become one of 1,024,000 x 256.
    """
    if not by_dali(images):
        return _each(partial(resize_crop, side=side), images, draws["size"], draws["resized"], draws["corner"])
    whole, size, corner = (_float(draws[name]) for name in ("size", "resized", "corner"))
    start, end = corner * whole / size, (corner + side) * whole / size
    return fn.resize(images, size=[side, side], roi_start=start, roi_end=end, **_CUBIC)


def by_dali(images: DataNode) -> bool:
    """Whether DALI resizes these images, or torch."""
    return images.device == "gpu"


def resize(image: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [H, W, 3] as uint8 [*size, 3]."""
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    planes = torch.nn.functional.interpolate(planes, size=list(size), mode="bicubic", antialias=True)
    return planes[0].permute(1, 2, 0).numpy()


def resize_crop(image: np.ndarray, whole: Size, size: Size, corner: Size, side: int) -> np.ndarray:
    """Of the uint8 [*whole, 3] at `size` what lies at `corner`: uint8 [side, side, 3].

    PIL computes nothing else, torch the whole, which is faster all the same unless the image is extremely long.
    """
    (height, width), (top, left) = size, corner
    if height * width <= _LONGEST * side**2:
        return resize(image, size)[top : top + side, left : left + side]
    down, across = whole[0] / height, whole[1] / width
    box = (left * across, top * down, (left + side) * across, (top + side) * down)
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC, box))


def _each(function: Callable[..., np.ndarray], images: DataNode, *sizes: DataNode) -> DataNode:
    """`function` of every image and its row of `sizes`."""
    of_batch = partial(_of_batch, function)
    return fn.python_function(
        images, *sizes, function=of_batch, batch_processing=True, num_outputs=1, output_layouts="HWC"
    )


def _of_batch(
    function: Callable[..., np.ndarray], images: Sequence[np.ndarray], *sizes: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """What DALI calls; `function` gets its sizes as lists."""
    rows = zip(images, *sizes, strict=True)
    return [function(np.asarray(image), *(np.asarray(size).tolist() for size in row)) for image, *row in rows]


def _float(numbers: DataNode) -> DataNode:
    return fn.cast(numbers, dtype=types.FLOAT)
