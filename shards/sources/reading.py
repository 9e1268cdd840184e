"""The bytes of one image of a source, whatever it lies in."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Protocol

from shards.layout import DataError
from shards.making.screening import Rejected
from shards.sources.listing import Place


class Listed(Protocol):
    """What a listing knows of an image (`Entry`, `planning.Item`)."""

    path: str
    size: int
    place: Place | None


def read_image(root: Path, item: Listed) -> bytes:
    """The encoded image.

    Raises Rejected (io) where it cannot be read, DataError where it is not what was listed.
    """
    if item.place is not None and item.place.kind == "parquet":
        from shards.sources.parquet import read_row

        return read_row(root / item.place.file, item.place.position)
    name = item.path if item.place is None else item.place.file
    path = os.path.join(os.fsencode(root), name.encode("utf-8", "surrogateescape"))
    try:
        # O_NONBLOCK: a pipe put in the place of the file must not stop us
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            regular = stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
            data = _content(stream, item) if regular else b""
    except OSError as error:
        raise Rejected("io", error.strerror or str(error)) from error
    if not regular or len(data) != item.size:
        raise DataError(
            f"source: {item.path!r} changed while it was converted: {item.size:,} bytes when listed, "
            f"{len(data):,} now; leave the source alone and start with a new output folder"
        )
    return data


def _content(stream, item: Listed) -> bytes:
    if item.place is None:
        return stream.read()
    stream.seek(item.place.position)
    return stream.read(item.size)
