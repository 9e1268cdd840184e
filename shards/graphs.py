"""What DALI does to an image: graphs that are functions of (encoded bytes, draws) and of nothing else.

The same function serves the reader's pipeline on a GPU, the same on a CPU, and a test. With a GPU the decoder is the
`mixed` one and everything after it runs there; draws stay on the CPU as per-sample arguments. Every graph returns a
tuple of images, float32 CHW, normalised, in RGB (gray, CMYK and palette images included), never rotated by EXIF:
ImageNet practice is not to, and PIL does not.
"""

from __future__ import annotations

from typing import Any

from nvidia.dali import fn, types
from nvidia.dali.data_node import DataNode

from recipes.schema import Data

Nodes = dict[str, DataNode]

_CUBIC = {"interp_type": types.INTERP_CUBIC, "antialias": True}


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
    """Crop, resize to image_size, flip: one image. Draws as `shards.draws.pretrain_mae` makes them.

    Only the crop is decoded where the format allows it (a sixth cheaper), and the resize sees no pixel outside it.
    """
    crops = fn.decoders.image_slice(encoded, draws["corner"], draws["shape"], axis_names="HW", **_decoding(data, gpu))
    images = fn.resize(crops, size=[data.image_size, data.image_size], **_CUBIC)
    return (_normalise(images, data, mirror=draws["mirror"]),)


def evaluate(encoded: DataNode, draws: Nodes, data: Data, gpu: bool) -> tuple[DataNode, ...]:
    """Resize the shorter side, crop the centre: one image. Draws as `shards.draws.evaluate` makes them.

    Resize and crop are one operation: of the resized image only the crop is computed, with a filter that sees the
    pixels around it. An image of 8000 x 2 pixels would otherwise become one of 1,024,000 x 256.
    """
    images = fn.decoders.image(encoded, **_decoding(data, gpu))
    size, resized, corner = (fn.cast(draws[name], dtype=types.FLOAT) for name in ("size", "resized", "corner"))
    images = fn.resize(
        images,
        size=[data.image_size, data.image_size],
        roi_start=corner * size / resized,
        roi_end=(corner + data.image_size) * size / resized,
        **_CUBIC,
    )
    return (_normalise(images, data),)
