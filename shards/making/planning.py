"""Which image goes into which shard, under which key: a pure function of the listing and the options.

A shard is a pure function of its part of the plan, so shards can be made in any order, by any number of workers, and
again: a finished shard carries the hash of its part. The shuffled order sorts by a hash of (seed, path), which no
library version, locale or file system can change.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from shards.layout import MAX_KEY, VERSION, DataError, escape_key, json_sha256
from shards.sources.listing import Entry, Listing, Place, described


@dataclass(frozen=True, kw_only=True)
class Options:
    """What shapes the shards; every field is part of the plan's hash. Raises ValueError for impossible values."""

    samples_per_shard: int = 1000
    shuffle: bool = True  # False: sorted order, for validation
    seed: int = 0
    short_side: int = 0  # pixels: larger images are resized to it and re-encoded; 0 keeps all original bytes
    quality: int = 95  # JPEG quality of re-encoded images
    max_pixels: int = 64_000_000  # per image, from the header: decoding more stalls DALI for minutes
    split: str = "train"  # name in timm's _info.json

    def __post_init__(self) -> None:
        ranges = {"samples_per_shard": (1, 10**6), "short_side": (0, 10**5), "quality": (1, 100)}
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}={getattr(self, name)}: a number from {low} to {high:,} is needed")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels={self.max_pixels}: at least 1 is needed")
        if not self.split:
            raise ValueError("split='': a name is needed, for example train")


class Item(NamedTuple):
    """One image of a shard."""

    path: str
    label: int
    size: int
    key: str
    problem: tuple[str, str] | None
    place: Place | None = None


@dataclass(frozen=True)
class ShardPlan:
    """The part of one shard, with the options that it needs."""

    number: int
    items: tuple[Item, ...]
    options: Options

    @property
    def sha256(self) -> str:
        """Identity of the shard: equal parts and options make equal bytes."""
        shaping = {name: getattr(self.options, name) for name in ("short_side", "quality", "max_pixels")}
        items = [described(item) for item in self.items]
        return json_sha256([VERSION, _encoder(self.options), shaping, items])


@dataclass(frozen=True)
class Plan:
    """The whole conversion."""

    listing: Listing
    options: Options
    shards: tuple[ShardPlan, ...]
    listing_sha256: str
    sha256: str

    @property
    def images(self) -> int:
        """Images that go in, good or bad."""
        return len(self.listing.entries)


def make_plan(listing: Listing, options: Options) -> Plan:
    """Keys, order and shards for every entry of `listing`."""
    entries = listing.entries
    keys = sample_keys(entries)
    items = [Item(e.path, e.label, e.size, key, e.problem, e.place) for e, key in zip(entries, keys, strict=True)]
    if options.shuffle:
        items.sort(key=lambda item: _digest(options.seed, item.path))
    step = options.samples_per_shard
    shards = tuple(
        ShardPlan(number, tuple(items[start : start + step]), options)
        for number, start in enumerate(range(0, len(items), step))
    )
    listed = json_sha256([listing.classes, [described(entry) for entry in entries]])
    whole = [VERSION, listed, asdict(options), [shard.sha256 for shard in shards]]
    return Plan(listing, options, shards, listed, json_sha256(whole))


def sample_keys(entries: Sequence[Entry]) -> list[str]:
    """One key per entry, all different even without regard to case.

    The file's stem where no other file has it, else class_stem. Of several files with one stem in one class (a.JPEG,
    a.png) the first by name has class_stem and the later ones class_stem_extension. A key that is taken even so, or
    too long for USTAR, ends in a hash of the path; the json member always holds the original name.
    """
    stems = [escape_key(_split(entry)[1]) for entry in entries]
    shared = Counter(stem.lower() for stem in stems)
    taken: dict[str, str] = {}
    for entry, stem in zip(entries, stems, strict=True):
        folder, plain, extension = _split(entry)
        longer = "_".join([*filter(None, [folder]), plain])
        names = [longer, f"{longer}_{extension}"] if shared[stem.lower()] > 1 else [plain]
        keys = [key for key in map(escape_key, names) if len(key) <= MAX_KEY]
        free = [key for key in [*keys, _hashed(stem, entry.path)] if key.lower() not in taken]
        if not free:
            raise DataError(f"source: no free key is left for {entry.path!r}; rename it")
        taken[free[0].lower()] = free[0]
    return list(taken.values())


def _split(entry: Entry) -> tuple[str, str, str]:
    """Folder (its class, or nothing), stem and extension of an entry's path."""
    folder, _, name = entry.path.rpartition("/")
    stem, extension = os.path.splitext(name)
    return folder, stem, extension.removeprefix(".")


def _hashed(stem: str, path: str) -> str:
    digest = hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:20]
    return f"{stem[: MAX_KEY - 21]}_{digest}"


def _digest(seed: int, path: str) -> bytes:
    return hashlib.sha256(f"{seed}/".encode() + path.encode("utf-8", "surrogateescape")).digest()


def _encoder(options: Options) -> str:
    """Who encodes: another Pillow may write other bytes, so a half-made folder must not mix two of them."""
    if not options.short_side:
        return "none"
    import PIL

    return f"pillow {PIL.__version__}"
