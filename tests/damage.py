"""Ways in which a stored image goes bad while its index stays valid: the length is kept, the bytes are not."""

from __future__ import annotations

from collections.abc import Callable

SCAN = b"\xff\xda"  # the marker after which a JPEG's pixels begin


def no_header(image: bytes) -> bytes:
    """Zeros from byte 32 on: the format can still be told, nothing else. DALI's decoder may crash on it."""
    return image[:32] + bytes(len(image) - 32)


def no_tables(jpeg: bytes) -> bytes:
    """A Huffman table of ones: the header can be parsed, no crop can be decoded."""
    start = jpeg.index(b"\xff\xc4") + 5
    return jpeg[:start] + b"\x7f" * 16 + jpeg[start + 16 :]


def no_end(jpeg: bytes) -> bytes:
    """Zeros at the end: of a JPEG that is not progressive, DALI decodes a crop that lies above without complaint."""
    kept = len(jpeg) - (len(jpeg) - jpeg.index(SCAN)) // 8
    return jpeg[:kept] + bytes(len(jpeg) - kept)


def no_image(image: bytes) -> bytes:
    """Text."""
    return (b"<html>404 Not Found</html>" * len(image))[: len(image)]


Damage = Callable[[bytes], bytes]
CERTAIN: tuple[Damage, ...] = (no_header, no_tables, no_image)  # fail whatever the crop
