"""What DALI does to an image: graphs that are functions of (encoded bytes, draws) and of nothing else.

The same function serves the reader's pipeline on a GPU, the same on a CPU, and a test. With a GPU the decoder is the
`mixed` one and everything after it runs there; draws stay on the CPU as per-sample arguments. Every graph returns a
tuple of images, float32 CHW, normalised, in RGB (gray, CMYK and palette images included), never rotated by EXIF:
ImageNet practice is not to, and PIL does not. Geometry is here, colour in photometry.py, and the resize, which alone
differs between GPU and CPU, in resizing.py.
"""

from __future__ import annotations

from typing import Any

from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode

from recipes.schema import Data
from shards.augment.photometry import Nodes, effect, jitter
from shards.augment.resizing import resized, resized_crop
from shards.draws.augmentations import SECOND

_PANEL = 32  # rows of the samples that stand for a whole image


def _decoding(data: Data, gpu: bool) -> dict[str, Any]:
    """Arguments of every decoder. Fancy upsampling makes nvJPEG's chroma agree with the CPU decoder's."""
    decoding = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}
    if not gpu:
        return {"device": "cpu", **decoding}
    # Two pipelines live side by side and a node holds several ranks: their threads must not share fixed cores.
    return {"device": "mixed", "hw_decoder_load": data.hw_decoder_load, "affine": False, **decoding}


def _normalise(images: DataNode, data: Data, mirror: DataNode | int = 0) -> DataNode:
    """uint8 HWC in 0 ... 255 to float32 CHW, by the mean and standard deviation of pixels in [0, 1]."""
    mean, std = ([255 * value for value in values] for values in (data.mean, data.std))
    return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std, mirror=mirror)


def pretrain_mae(encoded: DataNode, draws: Nodes, data: Data, gpu: bool) -> tuple[DataNode, ...]:
    """Crop, resize to image_size, flip: one image. Draws as `shards.draws.augmentations.pretrain_mae` makes them."""
    return (_normalise(_only_crop(encoded, draws, data, gpu), data, mirror=draws["mirror"]),)


def pretrain_lut(encoded: DataNode, draws: Nodes, data: Data, gpu: bool) -> tuple[DataNode, ...]:
    """Two crops of one decoded image, the second distorted. Draws as `augmentations.pretrain_lut` makes them.

    With data.shared_crop one crop serves both. The released program flips before it jitters; no later operation knows
    left from right, so it is done last.
    """
    if data.shared_crop:
        crops = _only_crop(encoded, draws, data, gpu)
        strong = effect(jitter(crops, draws), draws, data.solarize_threshold)
        mirror = draws["mirror"]
        return _normalise(crops, data, mirror=mirror), _normalise(strong, data, mirror=mirror)
    canvas = _canvas(fn.decoders.image(encoded, **_decoding(data, gpu)), draws, data)
    second = {**draws, **{name.removesuffix(SECOND): node for name, node in draws.items() if name.endswith(SECOND)}}
    strong = effect(jitter(_cut(canvas, second, data), draws), draws, data.solarize_threshold)
    return (
        _normalise(_cut(canvas, draws, data), data, mirror=draws["mirror"]),
        _normalise(strong, data, mirror=second["mirror"]),
    )


def pretrain_dtm(encoded: DataNode, draws: Nodes, data: Data, gpu: bool) -> tuple[DataNode, ...]:
    """Jitter, crop, flip: one image. Draws as `shards.draws.augmentations.pretrain_dtm` makes them.

    The released program jitters the whole image, this graph only what the crop shows. What contrast must know of the
    rest is the mean gray, after the operations before it: below the crop hangs a panel of pixels picked from the whole
    image, which goes through the same operations. What remains is that levels are clamped after the resize, not
    before: up to 1.7 levels in the mean over a photograph, 0.7 on average.
    """
    images = fn.decoders.image(encoded, **_decoding(data, gpu))
    panel = fn.resize(images, size=[_PANEL, data.image_size], interp_type=types.INTERP_NN, antialias=False)
    crops = _cut(_canvas(images, draws, data), draws, data)
    crops = jitter(fn.cat(crops, panel, axis=0), draws, first_row=data.image_size)
    return (_normalise(crops[: data.image_size], data, mirror=draws["mirror"]),)


def _only_crop(encoded: DataNode, draws: Nodes, data: Data, gpu: bool) -> DataNode:
    """The one crop that is made of an image, at its final size.

    Of rrc only the crop is decoded where the format allows it (a sixth cheaper), and the resize sees no pixel outside.
    """
    decoding = _decoding(data, gpu)
    if data.crop == "rrc":
        crops = fn.decoders.image_slice(encoded, draws["corner"], draws["shape"], axis_names="HW", **decoding)
        return resized(crops, [data.image_size, data.image_size])
    return _cut(_canvas(fn.decoders.image(encoded, **decoding), draws, data), draws, data)


def _canvas(images: DataNode, draws: Nodes, data: Data) -> DataNode:
    """What crops are cut from: the decoded image (rrc), or that resized and padded by reflection (src)."""
    if data.crop == "rrc":
        return images
    return _reflected(resized(images, draws["resized"]), data.crop_padding)


def _cut(canvas: DataNode, draws: Nodes, data: Data) -> DataNode:
    """One crop at its final size, image_size on both sides."""
    side = [data.image_size, data.image_size]
    if data.crop == "rrc":
        return resized(fn.slice(canvas, draws["corner"], draws["shape"], axis_names="HW"), side)
    return fn.slice(canvas, start=draws["corner"], shape=side, axis_names="HW")


def _reflected(images: DataNode, padding: int) -> DataNode:
    """`padding` pixels more at each side, mirrored without the edge itself (fn.pad knows constants only)."""
    if not padding:
        return images
    top = fn.flip(images[1 : padding + 1], vertical=1, horizontal=0)
    bottom = fn.flip(images[-padding - 1 : -1], vertical=1, horizontal=0)
    images = fn.cat(top, images, bottom, axis=0)
    left, right = fn.flip(images[:, 1 : padding + 1]), fn.flip(images[:, -padding - 1 : -1])
    return fn.cat(left, images, right, axis=1)


def evaluate(encoded: DataNode, draws: Nodes, data: Data, gpu: bool) -> tuple[DataNode, ...]:
    """Resize the shorter side, crop the centre: one image. Draws as `shards.draws.augmentations.evaluate` makes them.

    Resize and crop are one operation (resizing.py).
    """
    images = fn.decoders.image(encoded, **_decoding(data, gpu))
    return (_normalise(resized_crop(images, draws, data.image_size), data),)
