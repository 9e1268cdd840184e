"""Archives of named arrays (`.npz`), read strictly and by any number of threads.

numpy reads the header of an array with `ast.literal_eval`, which in CPython 3.11 fails now and then where two threads
do so at once ("AST constructor recursion depth mismatch"), and an index that is in order then looks damaged. What
`numpy.savez` writes for arrays of one dimension is one line of fixed form; nothing else is believed.
"""

from __future__ import annotations

import io
import re
import zipfile

import numpy as np

_SUFFIX = ".npy"
_MAGIC = b"\x93NUMPY\x01\x00"  # format version 1.0, then the header's length in two bytes
_HEADER = re.compile(rb"\{'descr': '([<|][biufS]\d+)', 'fortran_order': False, 'shape': \((\d+),\), \} *\n")


def read_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The arrays [n] of the bytes of an `.npz` that was written by `numpy.savez`, by name; they are read-only.

    ValueError or zipfile.BadZipFile for anything else.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {entry.filename.removesuffix(_SUFFIX): _array(archive, entry) for entry in archive.infolist()}


def read_array(data: bytes, name: str) -> np.ndarray:
    """One of them, whatever the others are like; KeyError where it is missing."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return _array(archive, archive.getinfo(name + _SUFFIX))


def _array(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> np.ndarray:
    if not entry.filename.endswith(_SUFFIX) or entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{entry.filename}: an array stored without compression is needed")
    content = archive.read(entry)
    start = len(_MAGIC) + 2
    end = start + int.from_bytes(content[len(_MAGIC) : start], "little")
    header = _HEADER.fullmatch(content[start:end]) if content.startswith(_MAGIC) else None
    if not header:
        raise ValueError(f"{entry.filename}: not an array of one dimension in numpy's format 1.0")
    kind, length = np.dtype(header[1].decode()), int(header[2])
    if len(content) - end != kind.itemsize * length:
        raise ValueError(f"{entry.filename}: {len(content) - end:,} bytes, not {length:,} of {kind}")
    return np.frombuffer(content, kind, length, end)
