"""Where images come from, and what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.checks import require

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LONGEST_TIMEOUT = 10**6


@dataclass(frozen=True, kw_only=True)
class Data:
    """Where the shards are and what is done to an image before the model sees it."""

    train: str = ""  # folder of training shards; empty: $MASKWRIGHT_DATA/train, then data/imagenet/train
    val: str = ""  # folder of validation shards; empty: the folder `val` beside data.train, if there is one
    image_size: int = 224  # pixels, both sides
    crop: Literal["rrc", "src"] = "rrc"  # random resized crop (MAE, DTM), or simple resized crop (LUT)
    scale: tuple[float, float] = (0.2, 1.0)  # rrc: share of the image's area
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # rrc: width / height
    crop_padding: int = 4  # src: pixels reflected at each side of the resized image
    hflip: float = 0.5  # probability of a horizontal flip
    shared_crop: bool = False  # pretrain_lut: both images show the same crop, flipped alike; only colours differ
    # Colour jitter of the view pretrain_dtm and of pretrain_lut's second image; strength 0 leaves an operation out.
    brightness: float = 0.0  # factor in 1 - b ... 1 + b; LUT and DTM: 0.4
    contrast: float = 0.0  # likewise, about the mean gray; LUT and DTM: 0.4
    saturation: float = 0.0  # likewise, about the pixel's gray; LUT: 0.2, DTM: 0.4
    hue: float = 0.0  # shift in -h ... h turns of the colour circle, at most 1/6; LUT: 0.1
    jitter_prob: float = 1.0  # share of the images that are jittered; LUT: 0.8, DTM: 1
    # The second image of pretrain_lut then becomes gray, solarized or blurred, a third each.
    solarize_threshold: int = 128  # levels of 255: values from here on are inverted
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels, uniform
    mean: tuple[float, float, float] = IMAGENET_MEAN  # of pixels in [0, 1]
    std: tuple[float, float, float] = IMAGENET_STD
    eval_crop: float = 0.875  # evaluation: image_size / shorter side before the centre crop
    block_size: int = 1  # samples of one shard read in a row; 16 suits slow disks (shuffles nearly as well)
    threads: int = 0  # decoding threads per rank; 0: its share of the node's cores, less two beside a GPU
    prefetch: int = 2  # batches prepared ahead
    hw_decoder_load: float = 0.9  # share of JPEGs for the GPU's hardware decoder, where it has one
    # A sample that cannot be decoded ends the run, or is named and replaced by the next that can.
    on_bad_sample: Literal["fail", "quarantine"] = "fail"
    max_bad_fraction: float = 0.001  # quarantine: the run ends when more of the samples are bad, but for a single one
    timeout: float = 600.0  # seconds without a batch after which the run ends with a stack dump; 0: waits for ever
    # data.train and data.val may be URLs of folders of shards (http, s3, ...): they are fetched before the first step.
    cache: str = ""  # folder for fetched shards; empty: $XDG_CACHE_HOME/maskwright/shards, or ~/.cache/...
    fetch_tries: int = 5  # times that a file is asked for, with pauses of 1, 2, 4, ... seconds

    def __post_init__(self) -> None:
        require(self.image_size >= 1, f"data.image_size={self.image_size}: at least 1 pixel is needed")
        low, high = self.scale
        require(0 < low <= high <= 1, f"data.scale={self.scale}: 0 < low <= high <= 1 is needed")
        low, high = self.ratio
        require(0 < low <= high, f"data.ratio={self.ratio}: 0 < low <= high is needed")
        require(
            0 <= self.crop_padding < self.image_size,
            f"data.crop_padding={self.crop_padding}: 0 to data.image_size - 1 = {self.image_size - 1} pixels can be "
            "reflected",
        )
        for name in ("hflip", "jitter_prob"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.{name}={value}: a probability in [0, 1] is needed")
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.{name}={value}: a strength in [0, 1] is needed (0: off)")
        require(0 <= self.hue <= 1 / 6, f"data.hue={self.hue}: a share of the circle in [0, 1/6] is needed (0: off)")
        require(
            0 <= self.solarize_threshold <= 255,
            f"data.solarize_threshold={self.solarize_threshold}: a level in 0 ... 255 is needed",
        )
        low, high = self.blur_sigma
        require(0 < low <= high, f"data.blur_sigma={self.blur_sigma}: 0 < low <= high pixels is needed")
        require(0 < self.eval_crop <= 1, f"data.eval_crop={self.eval_crop}: a share in (0, 1] is needed")
        require(self.block_size >= 1, f"data.block_size={self.block_size}: at least 1 is needed")
        require(self.threads >= 0, f"data.threads={self.threads}: 0 (its share) or a number of threads is needed")
        require(self.prefetch >= 1, f"data.prefetch={self.prefetch}: at least 1 is needed")
        require(
            0 <= self.hw_decoder_load <= 1,
            f"data.hw_decoder_load={self.hw_decoder_load}: a share in [0, 1] is needed",
        )
        require(min(self.std) > 0, f"data.std={self.std}: positive numbers are needed")
        require(
            0 <= self.max_bad_fraction < 1,
            f"data.max_bad_fraction={self.max_bad_fraction:g}: a share in [0, 1) is needed",
        )
        require(
            0 <= self.timeout <= LONGEST_TIMEOUT,
            f"data.timeout={self.timeout:g}: 0 (off) to {LONGEST_TIMEOUT:,} seconds are needed",
        )
        require(self.fetch_tries >= 1, f"data.fetch_tries={self.fetch_tries}: at least 1 is needed")
