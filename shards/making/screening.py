"""May this image be trained on? Asked once, when it is converted, so that no bad byte reaches a shard.

The questions come in the order of what they cost and of what they protect: is there anything, is it JPEG, PNG or
WebP by its magic bytes (never by its name), is the header sane and the picture small enough to decode, and does the
decoder of the training take all of it. That one decides because DALI cannot skip a bad sample (it stops the batch) and
refuses some files that Pillow forgives, such as a PNG with a wrong checksum. Pillow says what is wrong with an image
that DALI refuses. It decodes an image that DALI takes only where DALI's codecs warn: they make gray of a scan that
breaks off at a foreign marker, which Pillow refuses; all else that it would find, in our corpus, DALI finds too.

Height and width are those of the stored pixels: EXIF rotation is ignored here as it is in training.
"""

from __future__ import annotations

import functools
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image

_MAGIC = ((b"\xff\xd8", "jpg"), (b"\x89PNG\r\n\x1a\n", "png"))
_PIL_FORMAT = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_FOREIGN = (
    (b"GIF8", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "BigTIFF"),
    (b"MM\0+", "BigTIFF"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x0a", "JPEG XL"),
    (b"8BPS", "Photoshop"),
    (b"\0\0\1\0", "icon"),
)
_SHORTEST_MAGIC = 12  # bytes: less cannot even name its format
_GATE_IMAGES = 64  # images handed to DALI at once ...
_GATE_PIXELS = 16_000_000  # ... but not more pixels than these, unless one image has them alone


class Rejected(Exception):
    """An image that must be left out: a reason of one word for counting, and a detail for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = " ".join(detail.split())[:200]  # one line: it is printed and stored beside others


class OutOfMemory(Exception):
    """A decoder did not get the memory that it asked for: says nothing yet about the image."""


@dataclass(frozen=True)
class Screened:
    """An image fit for training, as it will be stored."""

    data: bytes
    extension: str  # jpg, png or webp, by content
    height: int  # pixels as stored
    width: int


def screen(data: bytes, *, max_pixels: int, short_side: int = 0, quality: int = 95, decode: bool = True) -> Screened:
    """Check `data` with Pillow; raise Rejected if it is not a still JPEG, PNG or WebP that decodes completely.

    Without `decode`, of images that keep their bytes only the header is checked: the training's decoder comes next.
    `short_side` > 0 resizes images whose shorter side is longer than that (bicubic with antialiasing, the longer side
    rounded down as in torchvision) and stores them as JPEG of `quality`; all others keep their bytes.
    """
    extension = image_kind(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd EXIF and about large pictures: judged below
        image = _open(data, extension)
        width, height = image.size
        if width * height > max_pixels:
            raise Rejected("too-large", f"{width} x {height} pixels, the limit is {max_pixels:,}")
        if extension != "jpg" and getattr(image, "is_animated", False):
            raise Rejected("animated", f"{getattr(image, 'n_frames', 0)} frames")
        if image.mode == "CMYK" and "adobe" not in image.info:
            raise Rejected("ambiguous", "CMYK without Adobe's marker: Pillow inverts its colours and DALI does not")
        smaller = 0 < short_side < min(width, height)
        if decode or smaller:
            _load(image)
        if smaller:
            return _reencoded(image, short_side, quality)
    return Screened(data, extension, height, width)


def image_kind(data: bytes) -> str:
    """`jpg`, `png` or `webp` by magic bytes; raises Rejected (empty, header, format, unsupported)."""
    if not data:
        raise Rejected("empty", "0 bytes")
    if len(data) < _SHORTEST_MAGIC:
        raise Rejected("header", f"only {len(data)} bytes")
    for magic, extension in _MAGIC:
        if data.startswith(magic):
            return extension
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    foreign = next((name for magic, name in _FOREIGN if data.startswith(magic)), None)
    if data[4:8] == b"ftyp":
        foreign = f"ISO media ({data[8:12].decode('ascii', 'replace')})"  # AVIF, HEIC
    elif data[:2] == b"BM" and data[6:10] == bytes(4):
        foreign = "BMP"
    elif data[:1] == b"P" and data[1:2] in b"1234567" and data[2:3].isspace():
        foreign = "PNM"
    if foreign:
        raise Rejected("unsupported", f"{foreign}; JPEG, PNG and WebP are stored")
    raise Rejected("format", f"not an image: begins with {data[:8]!r}")


def _open(data: bytes, extension: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=[_PIL_FORMAT[extension]])
    except Image.DecompressionBombError as error:
        raise Rejected("too-large", str(error)) from error
    except Exception as error:  # Pillow's parsers raise many kinds on hostile bytes; all mean the same here
        _tell_memory(error)
        raise Rejected("header", str(error).partition("<_io.BytesIO")[0] or type(error).__name__) from error


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # as in `_open`
        _tell_memory(error)
        truncated = "truncated" in str(error) or isinstance(error, EOFError)
        raise Rejected("truncated" if truncated else "corrupt", str(error) or type(error).__name__) from error


def _tell_memory(error: Exception) -> None:
    """Raise OutOfMemory if that is what `error` is about; codecs have several words for it."""
    words = ("out of memory", "insufficient memory", "bad_alloc", "cannot allocate memory")
    if isinstance(error, MemoryError) or any(word in str(error).lower() for word in words):
        raise OutOfMemory(str(error)) from error


def _reencoded(image: Image.Image, short_side: int, quality: int) -> Screened:
    width, height = image.size
    scale = min(width, height)
    size = (width * short_side // scale, height * short_side // scale)
    small = _rgb(image).resize(size, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=quality)
    return Screened(stream.getvalue(), "jpg", small.height, small.width)


def _rgb(image: Image.Image) -> Image.Image:
    """Three 8-bit channels. 16-bit gray is scaled as DALI does; Pillow would clip it at 255."""
    if image.mode.startswith("I"):
        gray = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(np.rint(gray).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def refused_by_training_decoder(images: Sequence[Screened]) -> list[Rejected | None]:
    """For each image, why DALI's CPU decoder does not take it, or None. `images` must have passed `screen`.

    The reason is Pillow's where it refuses the image too. DALI can hang and crash on hostile bytes: `screener.Screener`
    calls this in a process that may die.
    """
    with _stderr_kept() as warned:
        if _decodes(images) and not warned():
            return [None] * len(images)
        return [_refusal(image, warned) for image in images]


def _refusal(image: Screened, warned: Callable[[], bool]) -> Rejected | None:
    """Why one image must be left out, or None."""
    if not _decodes([image]):
        return _complaint(image) or Rejected("decoder", "DALI does not decode it")
    return _complaint(image) if warned() else None


def _complaint(image: Screened) -> Rejected | None:
    """What Pillow says of an image that it does not decode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _load(_open(image.data, image.extension))
        except Rejected as rejected:
            return rejected
    return None


def prepare_training_decoder() -> None:
    """Load DALI and build its decoder now, so that no image pays for it."""
    _training_decoder()


def gate_batches(images: Sequence[Screened]) -> Iterator[slice]:
    """Cut `images` into runs small enough to be decoded together."""
    start = pixels = 0
    for position, image in enumerate(images):
        pixels += image.height * image.width
        if position > start and (pixels > _GATE_PIXELS or position - start == _GATE_IMAGES):
            yield slice(start, position)
            start, pixels = position, image.height * image.width
    if start < len(images):
        yield slice(start, len(images))


def _decodes(images: Sequence[Screened]) -> bool:
    """Whether DALI decodes every one of `images` to the size that its header promised."""
    run = _training_decoder()
    try:
        shapes = run(images)
    except RuntimeError as error:
        _training_decoder.cache_clear()  # DALI calls a pipeline invalid once it has raised
        _tell_memory(error)
        return False
    return shapes == [(image.height, image.width, 3) for image in images]


@functools.cache
def _training_decoder() -> Callable[[Sequence[Screened]], list[tuple[int, ...]]]:
    """A DALI pipeline that decodes on the CPU; returns the shapes. One per process."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=_GATE_IMAGES, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def decode() -> object:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False)

    pipeline = decode()
    pipeline.build()

    def run(images: Sequence[Screened]) -> list[tuple[int, ...]]:
        pipeline.feed_input("encoded", [np.frombuffer(image.data, np.uint8) for image in images])
        (decoded,) = pipeline.run()
        return [tuple(shape) for shape in decoded.shape()]

    return run


@contextmanager
def _stderr_kept() -> Iterator[Callable[[], bool]]:
    """Inside, nothing is shown on stderr; gives a function that tells whether anything was since it was last asked.

    DALI's codecs write their warnings to file descriptor 2 themselves.
    """
    saved, kept = os.dup(2), os.memfd_create("stderr")

    def warned() -> bool:
        said = os.lseek(kept, 0, os.SEEK_CUR) > 0
        os.lseek(kept, 0, os.SEEK_SET)
        os.ftruncate(kept, 0)
        return said

    try:
        os.dup2(kept, 2)
        yield warned
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(kept)
