"""Kind and size of an image from its first bytes, for images that are indexed where they lie.

JPEG, PNG and WebP say their size in the beginning, and that is all that is read. Whatever is not the plain form of
these formats (animations, twelve bits, four colours, bytes between segments) is looked at as a whole, by the
converter's own check.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from shards.making.planning import Options
from shards.making.screening import OutOfMemory, Rejected, image_kind, screen

MAX_PIXELS = Options.max_pixels  # as in a conversion
_MOST_BYTES = 2**28  # of an image: nobody takes such pictures
_STEP = 512  # bytes read at a segment that lies further in
_MOST_SEGMENTS = 1000
_UNUSUAL = (0, 0)  # a size that the beginning does not tell
_FRAME = struct.Struct(">BHHB")
_SIZE = struct.Struct(">HH")
# What nearly all programs write, found in a third of the time: JFIF, tables, an 8-bit frame of 1 or 3 components.
_USUAL_JPEG = re.compile(
    rb"\xff\xd8(?:\xff\xe0\0\x10.{14})?(?:\xff\xdb\0(?:\x43.{65}|\x84.{130}))*"
    rb"\xff[\xc0-\xc2]\0(?:\x0b\x08(.{4})\x01|\x11\x08(.{4})\x03)",
    re.DOTALL,
)
_PLAIN_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive
_WITHOUT_LENGTH = frozenset((0x00, 0x01, 0xFF, *range(0xD0, 0xDA)))  # and those after which no frame header comes

Read = Callable[[int, int], bytes]  # bytes of the image: from, how many


def read_image_header(head: bytes, size: int, read: Read) -> tuple[str, int, int]:
    """(jpg, png or webp by content; height; width in pixels as stored) of an image of `size` bytes.

    It begins with `head`; `read` brings more of it.

    Raises Rejected (empty, header, format, unsupported, too-large, animated, or what the whole image is found to be).
    """
    if size > _MOST_BYTES:
        raise Rejected("too-large", f"{size:,} bytes, the limit is {_MOST_BYTES:,}")
    usual = _USUAL_JPEG.match(head)
    if usual:
        kind, (height, width) = "jpg", _SIZE.unpack(usual[usual.lastindex])
    else:
        if len(head) < min(size, _STEP):
            head = read(0, min(size, _STEP))
        kind = image_kind(head)
        height, width = _SIZES[kind](head, size, read)
    if not height * width:
        return _whole(size, read)
    if height * width > MAX_PIXELS:
        raise Rejected("too-large", f"{width} x {height} pixels, the limit is {MAX_PIXELS:,}")
    return kind, height, width


def _whole(size: int, read: Read) -> tuple[str, int, int]:
    """For what the beginning does not tell: the whole image is decoded."""
    try:
        screened = screen(read(0, size), max_pixels=MAX_PIXELS)
    except OutOfMemory as error:
        raise Rejected("memory", str(error)) from error
    return screened.extension, screened.height, screened.width


def _jpeg_size(head: bytes, size: int, read: Read) -> tuple[int, int]:
    """Height and width from the frame header, which comes after any number of other segments."""
    base, at = 0, 2  # of `head` in the image, and of a segment in `head`
    for _ in range(_MOST_SEGMENTS):
        if at + 10 > len(head):
            base, at = base + at, 0
            if base + 10 > size:
                return _UNUSUAL
            head = read(base, min(_STEP, size - base))
        marker, length = head[at + 1], head[at + 2] << 8 | head[at + 3]
        if head[at] != 0xFF or marker in _WITHOUT_LENGTH or length < 2:
            return _UNUSUAL
        if marker in _PLAIN_FRAMES:
            return _frame_size(head, at + 4, length)
        at += 2 + length
    return _UNUSUAL


def _frame_size(head: bytes, at: int, length: int) -> tuple[int, int]:
    precision, height, width, components = _FRAME.unpack_from(head, at)
    plain = precision == 8 and components in (1, 3) and length == 8 + 3 * components
    return (height, width) if plain else _UNUSUAL


def _png_size(head: bytes, size: int, read: Read) -> tuple[int, int]:
    """Height and width, if the pixels begin before anything says that the picture moves."""
    if size < 45 or head[8:16] != b"\0\0\0\x0dIHDR":
        return _UNUSUAL
    width, height, depth, colours = struct.unpack_from(">IIBB", head, 16)
    if not (width < 2**31 and height < 2**31 and depth in (1, 2, 4, 8, 16) and colours in (0, 2, 3, 4, 6)):
        return _UNUSUAL
    base, at = 0, 33
    for _ in range(_MOST_SEGMENTS):
        if at + 8 > base + len(head):
            if at + 8 > size:
                return _UNUSUAL
            head, base = read(at, min(_STEP, size - at)), at
        length, name = struct.unpack_from(">I4s", head, at - base)
        if name == b"IDAT":
            return height, width
        if name == b"acTL":
            return _UNUSUAL
        at += 12 + length
    return _UNUSUAL


def _webp_size(head: bytes, size: int, read: Read) -> tuple[int, int]:
    """Height and width of a lossy, lossless or extended still picture."""
    if size < 30:
        return _UNUSUAL
    form = head[12:16]
    if form == b"VP8 " and head[23:26] == b"\x9d\x01\x2a" and not head[20] & 1:
        width, height = struct.unpack_from("<HH", head, 26)
        return height & 0x3FFF, width & 0x3FFF
    if form == b"VP8L" and head[20] == 0x2F:
        bits = int.from_bytes(head[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    if form == b"VP8X" and not head[20] & 2:  # the bit says that it moves
        return int.from_bytes(head[27:30], "little") + 1, int.from_bytes(head[24:27], "little") + 1
    return _UNUSUAL


_SIZES = {"jpg": _jpeg_size, "png": _png_size, "webp": _webp_size}
