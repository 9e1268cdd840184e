"""The 512 bytes before every file of a tar, strictly: checksums, numbers, names. POSIX (ustar, pax) and GNU.

Headers come as rows of a table, so that thousands are checked at once. Whoever reads tars of others finds numbers
that Python would take and tar does not mean, names that lead out of the folder, and headers with a changed byte.
"""

from __future__ import annotations

import re

import numpy as np

SIZE = slice(124, 136)  # bytes of data behind the header
CHECKSUM = slice(148, 156)  # sum of the header's bytes, this field taken as spaces
KIND = 156
BINARY = 0x80  # where the first digit would be: the number is not in digits (GNU, from 8 GiB on)
_NAME, _MAGIC, _PREFIX = slice(0, 100), slice(257, 263), slice(345, 500)
_MAGICS = (b"ustar", b"ustar ", b"")  # POSIX, GNU, and none before 1988; zero bytes at the end do not count
_DIGITS = re.compile(rb"[ \0]*([0-7]+)[ \0]*")
_CONTROL = bytes((*range(32), 127))
# Absolute, empty, `.` or `..` as a part, two slashes, control characters.
_ODD_NAME = re.compile(rb"\A/|\A\Z|(?:\A|/)\.\.?(?:/|\Z)|//|[\x00-\x1f\x7f]")


def right_checksums(table: np.ndarray) -> np.ndarray:
    """Which headers have the checksum and the format's name that they should: bool [M] of uint8 [M, 512]."""
    told = table[:, CHECKSUM]
    right = _octal(told) == table.sum(1, dtype=np.uint32) - told.sum(1, dtype=np.uint32) + 8 * ord(" ")
    magic = table[:, _MAGIC]
    if (magic == magic[0]).all():  # one program wrote them all
        return right & (magic[0].tobytes().rstrip(b"\0") in _MAGICS)
    return right & np.isin(_texts(table, _MAGIC), _MAGICS)


def plain_sizes(table: np.ndarray, sizes: list[int]) -> np.ndarray:
    """Which headers tell these sizes, in nothing but octal digits and blanks, or in binary: bool [M].

    Python's `int` reads more: signs, underscores, prefixes.
    """
    text = table[:, SIZE]
    if ((text[:, :11] - ord("0") < 8).all(1) & _is_blank(text[:, 11])).all():
        return np.ones(len(table), bool)  # as nearly all programs write it, and as `int` reads it
    return (_octal(text) == sizes) | (text[:, 0] == BINARY)


def parse_size(header: bytes) -> int:
    """Bytes of data behind a header; -1 where that is no number."""
    text = header[SIZE]
    if text[0] == BINARY:
        return int.from_bytes(text[1:], "big")
    digits = _DIGITS.fullmatch(text)
    return int(digits[1], 8) if digits else -1


def names_of(table: np.ndarray) -> list[bytes]:
    """The names in headers; POSIX puts the beginning of a long one into a field of its own."""
    names = _texts(table, _NAME).tolist()
    for row in np.flatnonzero((table[:, _PREFIX.start] != 0) & (_texts(table, _MAGIC) == b"ustar")):
        names[row] = _until_zero(table[row, _PREFIX].tobytes()) + b"/" + _until_zero(names[row])
    return names if b"\0" not in b"".join(names) else [_until_zero(name) for name in names]


def odd_name(names: list[bytes]) -> bytes | None:
    """The first name that is empty, absolute, or has `.`, `..`, `//` or control characters in it."""
    joined = b"\n" + b"\n".join(names) + b"\n"
    controls = len(joined) - len(joined.translate(None, _CONTROL))
    if controls == len(names) + 1 and not any(part in joined for part in (b"\n/", b"\n.", b"/.", b"//", b"\n\n")):
        return None
    return next((name for name in names if _ODD_NAME.search(name)), None)


def parse_pax(content: bytes) -> dict[bytes, bytes] | None:
    """The lines `LENGTH NAME=VALUE` of a pax header; None unless all of it is exactly that."""
    records = {}
    while content:
        digits = content[:6].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        name, equals, value = content[len(digits) + 1 : length - 1].partition(b"=")
        if not (len(digits) < length <= len(content) and content[length - 1] == ord("\n") and equals and name):
            return None
        records[name] = value
        content = content[length:]
    return records


def named(header: bytes, position: int) -> str:
    """A file for messages, as far as its header says."""
    return f"byte {position:,}: file {_until_zero(header[_NAME])!r}"


def _texts(table: np.ndarray, part: slice) -> np.ndarray:
    """A field of all rows as texts without the zero bytes at their ends: S [M]."""
    return np.ascontiguousarray(table[:, part]).view(f"S{part.stop - part.start}")[:, 0]


def _until_zero(text: bytes) -> bytes:
    return text.partition(b"\0")[0]


def _is_blank(text: np.ndarray) -> np.ndarray:
    return (text == ord(" ")) | (text == 0)


def _octal(text: np.ndarray) -> np.ndarray:
    """Rows of octal digits with spaces or zero bytes around them, as int64; -1 where it is anything else."""
    digits = text - ord("0")  # uint8: what is below wraps around
    if (digits[:, :6] < 8).all() and _is_blank(text[:, 6:]).all():
        return digits[:, :6] @ 8 ** np.arange(5, -1, -1)
    value = np.zeros(len(text), np.int64)
    for column in digits.T:
        value = np.where(column < 8, value * 8 + column, value)
    begins = np.diff((digits < 8).astype(np.int8), axis=1, prepend=0) == 1  # of runs of digits
    return np.where(((digits < 8) | _is_blank(text)).all(1) & (begins.sum(1) == 1), value, -1)
