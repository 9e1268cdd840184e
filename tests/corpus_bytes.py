"""JPEG, PNG and WebP taken apart and put together again: what the corpus of bad images is made with."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

SOF, DHT, DQT, SOS, APP0, APP1, APP2, ADOBE = (b"\xff" + bytes([n]) for n in b"\xc0\xc4\xdb\xda\xe0\xe1\xe2\xee")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # Adam7


def put(data: bytes, at: int, new: bytes) -> bytes:
    """`data` with other bytes from `at` on."""
    return data[:at] + new + data[at + len(new) :]


def segment(marker: bytes, content: bytes) -> bytes:
    """A segment of a JPEG with its length."""
    return marker + struct.pack(">H", len(content) + 2) + content


def with_segment(jpeg: bytes, marker: bytes, content: bytes) -> bytes:
    """A JPEG with one more segment at its beginning."""
    return jpeg[:2] + segment(marker, content) + jpeg[2:]


def without_segment(jpeg: bytes, marker: bytes) -> bytes:
    """A JPEG without the first segment of a kind."""
    at = jpeg.index(marker)
    (length,) = struct.unpack(">H", jpeg[at + 2 : at + 4])
    return jpeg[:at] + jpeg[at + 2 + length :]


def frame(jpeg: bytes, *, marker: int = 0xC0, precision: int = 8) -> bytes:
    """A JPEG whose frame header is of another kind, or says another number of bits."""
    return put(put(jpeg, jpeg.index(SOF) + 4, bytes([precision])), jpeg.index(SOF) + 1, bytes([marker]))


def with_size(jpeg: bytes, height: int, width: int) -> bytes:
    """A JPEG whose frame header claims another size."""
    return put(jpeg, jpeg.index(SOF) + 5, struct.pack(">HH", height, width))


def with_sampling(jpeg: bytes, factors: Iterable[int]) -> bytes:
    """A JPEG whose three components claim other sampling factors."""
    for number, factor in enumerate(factors):
        jpeg = put(jpeg, jpeg.index(SOF) + 11 + 3 * number, bytes([factor]))
    return jpeg


def with_component_ids(jpeg: bytes, ids: bytes) -> bytes:
    """A JPEG whose three components have other names, in frame and scan."""
    for number, name in enumerate(ids):
        jpeg = put(jpeg, jpeg.index(SOF) + 10 + 3 * number, bytes([name]))
        jpeg = put(jpeg, jpeg.index(SOS) + 5 + 2 * number, bytes([name]))
    return jpeg


def scan(jpeg: bytes) -> int:
    """Where the pixels of a JPEG begin."""
    at = jpeg.index(SOS)
    return at + 2 + struct.unpack(">H", jpeg[at + 2 : at + 4])[0]


def in_scan(jpeg: bytes, new: bytes, at: int = 200) -> bytes:
    """A JPEG with other bytes between its pixels."""
    return put(jpeg, scan(jpeg) + at, new)


def thumbnail_exif(thumbnail: bytes) -> bytes:
    """An Exif block that holds a small JPEG and nothing else."""
    entries = ((0x0103, 3, 1, 6 << 16), (0x0201, 4, 1, 8 + 6 + 2 + 3 * 12 + 4), (0x0202, 4, 1, len(thumbnail)))
    body = b"".join(struct.pack(">HHII", *entry) for entry in entries)
    return b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\x0e" + struct.pack(">H", 3) + body + bytes(4) + thumbnail


def orientation_exif(orientation: int) -> bytes:
    """An Exif block with an orientation and nothing else."""
    return b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0" + bytes([orientation]) + bytes(6)


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG with length and checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def chunks(png: bytes) -> list[tuple[bytes, bytes]]:
    """Names and contents of a PNG's chunks."""
    found, at = [], len(PNG_MAGIC)
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        found.append((png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def png_of(parts: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A PNG of these chunks."""
    return PNG_MAGIC + b"".join(chunk(*part) for part in parts)


def with_chunk(png: bytes, name: bytes, content: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    first, *others = chunks(png)
    return png_of([first, (name, content), *others])


def pixel_stream(png: bytes) -> bytes:
    """The compressed pixels of a PNG."""
    return b"".join(content for name, content in chunks(png) if name == b"IDAT")


def with_pixel_stream(png: bytes, *streams: bytes) -> bytes:
    """A PNG with other compressed pixels, one chunk for each."""
    first, *_, last = chunks(png)
    return png_of([first, *((b"IDAT", stream) for stream in streams), last])


def raw_png(
    rows: Iterable[bytes],
    size: tuple[int, int],
    depth: int,
    colour: int,
    *extra: tuple[bytes, bytes],
    interlaced: bool = False,
    filter_type: int = 0,
) -> bytes:
    """A PNG of packed rows; `size` is (width, height), `extra` are chunks before the pixels."""
    header = struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, interlaced)
    pixels = zlib.compress(b"".join(bytes([filter_type]) + row for row in rows))
    return png_of([(b"IHDR", header), *extra, (b"IDAT", pixels), (b"IEND", b"")])


def deep_png(pixels: np.ndarray) -> bytes:
    """A PNG of 16 bits, from uint16 [H, W, channels]."""
    height, width, channels = pixels.shape
    rows = (row.astype(">u2").tobytes() for row in pixels)
    return raw_png(rows, (width, height), 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels])


def interlaced_png(picture: Image.Image) -> bytes:
    """An interlaced PNG, which Pillow cannot write."""
    pixels = np.asarray(picture.convert("RGB"))
    passes = (pixels[y::dy, x::dx] for x, y, dx, dy in _PASSES)
    rows = (row.tobytes() for part in passes if part.size for row in part)
    return raw_png(rows, picture.size, 8, 2, interlaced=True)


def flipped(data: bytes, at: int) -> bytes:
    """`data` with one bit changed."""
    return put(data, at, bytes([data[at] ^ 1]))


def decoded(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] by Pillow, never rotated; 16-bit gray is scaled, where Pillow would clip it."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I"):
            gray = np.rint(np.asarray(image, np.float64) / 257).clip(0, 255).astype(np.uint8)
            return np.repeat(gray[..., None], 3, axis=2)
        return np.asarray(image.convert("RGB"))
