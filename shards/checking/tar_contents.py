"""What a tar of ours says about itself: its samples and their members, read from its headers."""

from __future__ import annotations

import mmap
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from shards.dali_index import Member


class Contents(NamedTuple):
    """The samples of a tar by key, in its order."""

    members: dict[str, list[Member]]
    about: dict[str, dict[str, bytes]]  # contents of the members cls and json, by extension


def read_contents(file: Path) -> Contents:
    """Read a tar's headers and its small members; raises OSError and tarfile.TarError."""
    contents = Contents({}, {})
    with tarfile.open(file, "r:") as tar:
        for header in tar:
            key, _, extension = header.name.partition(".")
            member = Member(extension, header.offset_data, header.size, header.name)
            contents.members.setdefault(key, []).append(member)
            stream = tar.extractfile(header) if extension in ("cls", "json") else None
            contents.about.setdefault(key, {})
            if stream:
                contents.about[key][extension] = stream.read()
    return contents


@contextmanager
def mapped(file: Path) -> Iterator[memoryview]:
    """The bytes of a file that is not empty, without a copy of them."""
    with (
        open(file, "rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as tar,
        memoryview(tar) as view,
    ):
        yield view
