"""Shards that somebody else made, used where they are: which tars, where our index of them lies, and what it promises.

    DIR/*.tar                             never written to
    DIR/.maskwright/TAR.npz               our index of each tar (`ForeignIndex`)
    DIR/.maskwright/index.json            written last: the tars, their sizes and hashes, the classes

Where DIR cannot be written, the index lies in $XDG_CACHE_HOME/maskwright/indexes/ (default ~/.cache), in a folder named
by the hash of DIR's path. A part of a folder is named by a pattern, `DIR/imagenet1k-train-*.tar`; it has a file of its
own beside index.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from shards.foreign.samples import moved_sample
from shards.index import ForeignIndex, Promise, read_promised_index
from shards.layout import DataError, MissingData, canonical_json, escape_key, json_sha256, sha256_hex

FORMAT = "maskwright-foreign-index"
VERSION = 1
INDEX_FOLDER = ".maskwright"
ALL = "*.tar"
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class TarRecord:
    """One tar as the index promises it."""

    name: str  # of the file
    samples: int  # that can be trained on
    bytes: int  # of the tar
    headers_sha256: str
    npz_sha256: str  # of our index of it


@dataclass(frozen=True, kw_only=True)
class SetIndex:
    """A whole set: what is in it, and the hash of every index."""

    tars: tuple[TarRecord, ...]  # sorted bytewise by name
    classes: tuple[str, ...]  # names by class index; empty where there are no labels
    named_by: str  # where the names come from
    labels: str  # where labels stand: cls, json, none
    components: Mapping[str, int]  # samples by their extensions
    rejected: Mapping[str, int]  # images left out, by reason

    @property
    def samples(self) -> int:
        """Samples that can be trained on."""
        return sum(tar.samples for tar in self.tars)

    def text(self) -> str:
        """The file's exact text; it depends on the data only, and `checksum` covers all of the rest."""
        fields = {**vars(self), "tars": list(map(vars, self.tars)), "classes": list(self.classes)}
        body = {"format": FORMAT, "version": VERSION, "samples": self.samples, **fields}
        return canonical_json({**body, "checksum": json_sha256(body)})


@dataclass(frozen=True)
class OpenedSet:
    """An index that was found and read."""

    place: Path  # folder of the tars, or a pattern in it
    home: Path  # folder of the index
    index: SetIndex
    fingerprint: str  # sha256 of the index's text

    def tar(self, record: TarRecord) -> Path:
        """The file of a tar."""
        return split_place(self.place)[0] / record.name

    def npz(self, record: TarRecord) -> Path:
        """The file of our index of a tar."""
        return self.home / npz_name(record.name)


def npz_name(tar_name: str) -> str:
    """Name of the file of our index of a tar."""
    return f"{tar_name}.npz"


def command(place: Path) -> str:
    """What to type to index a place."""
    return shlex.join(["python", "tools/index_shards.py", str(place)])


def split_place(place: Path) -> tuple[Path, str]:
    """Folder and pattern of `DIR` or `DIR/PATTERN`."""
    if not place.is_dir() and any(mark in place.name for mark in "*?["):
        return place.parent, place.name
    return place, ALL


def find_tars(place: Path) -> list[Path]:
    """The tars of `DIR` or `DIR/PATTERN`, sorted bytewise; empty where there are none."""
    folder, pattern = split_place(place)
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    found = [name for name in names if fnmatchcase(name, pattern) and name.endswith(".tar") and name[0] != "."]
    return [folder / name for name in sorted(found, key=os.fsencode)]


def index_homes(folder: Path) -> tuple[Path, Path]:
    """Where the index of a folder may lie: beside the tars, or in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    digest = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return folder / INDEX_FOLDER, Path(cache) / "maskwright" / "indexes" / digest


def set_name(place: Path) -> str:
    """Name of the JSON file of a place."""
    _, pattern = split_place(place)
    return "index.json" if pattern == ALL else f"index-{escape_key(pattern)}.json"


def index_file(place: Path) -> Path | None:
    """The JSON file of a place, the newer one where there are two; None where it was not indexed."""
    folder, _ = split_place(place)
    files = [home / set_name(place) for home in index_homes(folder)]
    return max((file for file in files if file.is_file()), key=lambda file: file.stat().st_mtime_ns, default=None)


def find_index(place: Path) -> OpenedSet:
    """The index of `DIR` or `DIR/PATTERN`. Raises MissingData where it was not made, DataError where it is damaged."""
    file = index_file(place)
    if file is None:
        number = len(find_tars(place))
        raise MissingData(
            f"{place}: no finished shards of ours, {number:,} tars without an index; run {command(place)}"
        )
    try:
        text = file.read_bytes().decode("ascii")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not a usable index: {error}; run {command(place)}") from error
    return OpenedSet(place, file.parent, parse_set(text, file, place), sha256_hex(text.encode("ascii")))


def differing_tars(opened: OpenedSet) -> list[tuple[str, str]]:
    """(name, state) of the tars that are in the index or in the folder, but not in both."""
    promised, present = {tar.name for tar in opened.index.tars}, {tar.name for tar in find_tars(opened.place)}
    differing = sorted(promised ^ present, key=os.fsencode)
    return [(name, "missing" if name in promised else "extra: not in the index") for name in differing]


def read_set(place: Path) -> OpenedSet:
    """As `find_index`; DataError also where the folder holds other tars than the index."""
    opened = find_index(place)
    differing = differing_tars(opened)
    if differing:
        (name, state), number = differing[0], len(opened.index.tars)
        raise DataError(
            f"{place}: the index promises {number:,} tars, {len(differing):,} are missing or extra (first {name}: "
            f"{state}); restore them, or run {command(place)}"
        )
    return opened


def parse_set(text: str, file: Path, place: Path) -> SetIndex:
    """Read the JSON file strictly: DataError, naming `file`, for anything but what `SetIndex.text` writes."""
    try:
        body = json.loads(text)
        fields = {name: body[name] for name in SetIndex.__dataclass_fields__}
        fields["classes"] = tuple(fields["classes"])
        fields["tars"] = tuple(TarRecord(**tar) for tar in fields["tars"])
        index = SetIndex(**fields)
        if not index.tars or not all(isinstance(name, str) for name in index.classes):
            raise ValueError("tars, and names of classes, are needed")
        for tar in index.tars:
            _check_record(tar)
        if index.text() != text:
            raise ValueError("the text does not match its own checksum: it was edited or damaged")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: not a usable index: {error!s}; run {command(place)}") from error
    return index


def read_tar_index(opened: OpenedSet, record: TarRecord) -> ForeignIndex | str:
    """The index of one tar, or what is wrong with the tar or its index.

    Of the tar its size is compared, and the headers of three samples: that is enough to tell another tar.
    """
    promise = Promise(
        source="index.json",
        samples=record.samples,
        tar_size=record.bytes,
        npz_sha256=record.npz_sha256,
        bound_by=record.headers_sha256,
        num_classes=len(opened.index.classes),
    )
    index = read_promised_index(opened.tar(record), opened.npz(record), ForeignIndex, promise)
    if not isinstance(index, str) and (moved := moved_sample(opened.tar(record), index)):
        return f"{record.name} changed since it was indexed: {moved}"
    return index


def _check_record(tar: TarRecord) -> None:
    """ValueError unless every field is possible: names become paths."""
    counts = (tar.samples, tar.bytes)
    if not isinstance(tar.name, str) or "/" in tar.name or "\0" in tar.name or not tar.name.endswith(".tar"):
        raise ValueError(f"tar name {tar.name!r}")
    if not all(type(count) is int and count > 0 for count in counts):
        raise ValueError(f"{tar.name}: samples and bytes {counts}")
    digests = (tar.headers_sha256, tar.npz_sha256)
    if not all(isinstance(digest, str) and _SHA256.fullmatch(digest) for digest in digests):
        raise ValueError(f"{tar.name}: a sha256 is 64 hex digits")
