"""What an entry of the corpus is: something bad or odd, where it comes in, and what must become of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from images import encode, jpeg_bytes, smooth_picture

KEPT = "kept"
BROKEN = "truncated|corrupt|header|decoder"  # which of these is the decoders' business

PICTURE = smooth_picture(np.random.default_rng(2), 60, 40)
JPEG = jpeg_bytes(1, 120, 90)
PNG = encode(PICTURE, "PNG")
WEBP = encode(PICTURE, "WEBP")
MORE = {"save_all": True, "append_images": [PICTURE.rotate(90)]}  # two frames, for `encode`


@dataclass(frozen=True)
class Entry:
    """`fate` is KEPT, or a regular expression for the words with which it must be left out or refused."""

    name: str
    fate: str = KEPT
    row: int = 0  # of table 4A in specs/faults.md; 0: it is not in the table


@dataclass(frozen=True)
class BadImage(Entry):
    """A file of these bytes."""

    data: bytes = field(default=b"", repr=False)
    unseen: bool = False  # DALI makes something of it: only the converter, and --check --decode, leave it out


@dataclass(frozen=True)
class BadFile(Entry):
    """What `make` puts at a path inside a class folder; `same_as` are the bytes that must be kept."""

    make: Callable[[bytes], None] = lambda path: None
    same_as: bytes = field(default=b"", repr=False)


@dataclass(frozen=True)
class BadFolder(Entry):
    """What `make` does to a folder: to an empty one, or to shards that are whole."""

    make: Callable[[Path], None] = lambda folder: None
    quick: bool = True  # whether it must be found without reading the tars
    run: bool = True  # whether, if so, a run must refuse to begin; it has no use for the indexes of DALI


@dataclass(frozen=True)
class BadTar(Entry):
    """A tar that somebody else made; `samples` are (label, image) by key of what must be read from it, if anything."""

    make: Callable[[Path], object] = lambda path: None
    samples: dict[str, tuple[int, bytes]] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class BadText(Entry):
    """A file that a parser reads: dali (an .idx), manifest, index (an .npz), set (the index of a foreign set)."""

    parser: str = ""
    data: bytes = field(default=b"", repr=False)


def noise(*shape: int, levels: int = 256) -> np.ndarray:
    """uint8 or uint16 of this shape, the same at every call."""
    kind = np.uint8 if levels <= 256 else np.uint16
    return np.random.default_rng(sum(shape)).integers(0, levels, shape, dtype=kind)


def image(name: str, data: bytes, fate: str = KEPT, row: int = 0, *, unseen: bool = False) -> BadImage:
    """A `BadImage` in the order in which one says it."""
    return BadImage(name, fate, row, data, unseen)
