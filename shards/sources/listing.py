"""What every kind of source gives: a list of its images, and a way to read one.

An image is a file of its own, or a part of a bigger one that is never unpacked: the bytes of a member of a tar, a row
of a parquet file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from shards.layout import DataError


class Place(NamedTuple):
    """Where an image lies that is not a file of its own."""

    kind: Literal["tar", "parquet"]
    file: str  # relative to the root
    position: int  # tar: first byte of the data; parquet: row


class Entry(NamedTuple):
    """One image of the source."""

    path: str  # what it is called: CLASS/FILE; without a class only FILE
    label: int  # class index; -1 for none
    size: int  # bytes; 0 where it cannot be read or is not known before it is read (parquet)
    problem: tuple[str, str] | None = None  # reason and detail, when it is rejected unread
    place: Place | None = None  # none: the file `path` below the root


@dataclass(frozen=True)
class Listing:
    """A source: its classes, and its images in an order that depends on their names alone."""

    root: Path
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    empty: tuple[str, ...] = ()  # classes without a file
    ignored: int = 0  # files of the operating system, and files beside the class folders
    notes: tuple[str, ...] = ()  # what looks odd, one line each
    walked: bool = False  # whether all that lies below the root belongs to the source: nothing may be written there
    shuffled: bool = True  # whether images can be read in any order at the same cost (not so: parquet)

    @property
    def bytes(self) -> int:
        """Size of all images together, as far as it is known."""
        return sum(entry.size for entry in self.entries)


def described(entry: Any) -> tuple:
    """An entry's fields for a hash: what has no place is described as it was before places were known."""
    return tuple(entry) if entry.place is not None else tuple(entry)[:-1]


def numbered_classes(source: str, top: int, images: int) -> tuple[str, ...]:
    """Names of classes 0 to `top` that have none (-1: no classes); DataError for a number that cannot be meant."""
    if top >= 10 * images + 1000:
        raise DataError(f"{source}: class number {top:,} for {images:,} images; number classes from 0")
    return tuple(map(str, range(top + 1)))
