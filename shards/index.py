"""Our index of one tar: where each image lies, what it is, and the checksums that bind the index to its tar.

One `.npz` per tar, so that a million samples open in about a second and every number has one type. `meta` holds the
tar's size and sha256 and the hash of the shard's part of the plan; `rejected` the images that were left out of this
shard, so that a rerun need not look at them again. The bytes depend on the content only.

A tar that somebody else made is indexed without reading its images (`ForeignIndex`): there are no checksums of them,
and what binds index and tar is the hash of all headers.
"""

from __future__ import annotations

import io
import json
import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np

from shards.array_archives import read_arrays
from shards.layout import IMAGE_EXTENSIONS, TAR_BLOCK, DataError, Rejection, sha256_hex

_OURS = {
    "start": "<i8",  # first byte of the sample: its first tar header
    "offset": "<i8",  # first byte of the image
    "size": "<i8",  # bytes of the image
    "label": "<i4",  # class index; -1: none
    "height": "<i4",  # pixels as stored
    "width": "<i4",
    "crc32": "<u4",  # of the whole sample, headers included: tells which one is damaged
    "key": "S",
    "extension": "S",  # jpg, png or webp
}
_KEY = re.compile(rb"[A-Za-z0-9_-]+")


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """n samples of one tar of ours, in its order. Arrays [n] as in `ARRAYS`."""

    ARRAYS: ClassVar = _OURS
    META: ClassVar = {"tar_size": int, "tar_sha256": str, "dali_sha256": str, "plan_sha256": str}
    BOUND_BY: ClassVar = "tar_sha256"
    TOOL: ClassVar = "tools/make_shards.py"

    tar_size: int  # bytes
    tar_sha256: str
    dali_sha256: str  # of the .idx beside the tar
    plan_sha256: str  # of the part of the plan that the shard was made from
    arrays: Mapping[str, np.ndarray] = field(repr=False)
    rejected: tuple[Rejection, ...] = ()

    def __len__(self) -> int:
        return len(self.arrays["offset"])


@dataclass(frozen=True, eq=False)
class ForeignIndex:
    """n samples of one tar that somebody else made, in its order. Arrays [n] as in `ARRAYS`; keys are escaped."""

    ARRAYS: ClassVar = {name: kind for name, kind in _OURS.items() if name != "crc32"}
    META: ClassVar = {"tar_size": int, "headers_sha256": str}
    BOUND_BY: ClassVar = "headers_sha256"
    TOOL: ClassVar = "tools/index_shards.py"

    tar_size: int  # bytes
    headers_sha256: str  # of all headers of the tar: names, sizes, times
    arrays: Mapping[str, np.ndarray] = field(repr=False)
    rejected: tuple[Rejection, ...] = ()

    def __len__(self) -> int:
        return len(self.arrays["offset"])


Index = TypeVar("Index", ShardIndex, ForeignIndex)


def format_index(index: ShardIndex | ForeignIndex) -> bytes:
    """The bytes of the `.npz`."""
    meta = {name: getattr(index, name) for name in index.META}
    stream = io.BytesIO()
    arrays = {name: np.asarray(index.arrays[name]).astype(kind) for name, kind in index.ARRAYS.items()}
    texts = {"meta": json.dumps(meta, sort_keys=True), "rejected": json.dumps(index.rejected)}
    np.savez(stream, **arrays, **{name: np.frombuffer(text.encode("ascii"), np.uint8) for name, text in texts.items()})
    return stream.getvalue()


def parse_index(data: bytes, file: Path, kind: type[Index] = ShardIndex) -> Index:
    """Read the bytes of an index strictly; raises DataError, naming `file` and where it can the sample's key."""
    remedy = f"delete {file.name} and run {kind.TOOL} again"
    try:
        stored = read_arrays(data)
        texts = {name: json.loads(stored.pop(name).tobytes().decode("ascii")) for name in ("meta", "rejected")}
    except Exception as error:  # zipfile, numpy and json raise many kinds on damaged bytes
        raise DataError(f"{file}: not a readable index: {error or type(error).__name__}; {remedy}") from error
    meta = texts["meta"]
    if not isinstance(meta, dict) or {name: type(value) for name, value in meta.items()} != kind.META:
        raise DataError(f"{file}: meta holds {meta!r}; {remedy}")
    problem = _array_problem(stored, kind.ARRAYS) or _sample_problem(stored, meta["tar_size"])
    if problem:
        raise DataError(f"{file}: {problem}; {remedy}")
    try:
        rejected = tuple(_rejection(entry) for entry in texts["rejected"])
    except TypeError as error:
        raise DataError(f"{file}: the list of rejected images is damaged; {remedy}") from error
    return kind(**meta, arrays=stored, rejected=rejected)


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What a manifest, or the index of a foreign set, says of one tar and its index."""

    source: str  # who says so, for messages
    samples: int
    tar_size: int  # bytes
    npz_sha256: str
    bound_by: str  # the hash that binds index and tar: `BOUND_BY` names the index's field
    num_classes: int


def read_promised_index(tar: Path, file: Path, kind: type[Index], promise: Promise) -> Index | str:
    """The index of one tar, or what is wrong with the tar or its index. Of the tar only the size is compared."""
    try:
        tar_size = os.stat(tar).st_size
        data = file.read_bytes()
    except OSError as error:
        return f"{os.path.basename(error.filename)} {error.strerror}"
    if tar_size != promise.tar_size:
        return f"{tar.name} has {tar_size:,} bytes, not {promise.tar_size:,}"
    if sha256_hex(data) != promise.npz_sha256:
        return f"{file.name} is another index than that of the {promise.source}"
    index = parse_index(data, file, kind)
    found = len(index), index.tar_size, getattr(index, kind.BOUND_BY)
    if found != (promise.samples, promise.tar_size, promise.bound_by):
        return f"{file.name} is the index of another tar"
    top = index.arrays["label"].max()
    if top >= promise.num_classes:
        return f"{file.name} has labels up to {top}, there are {promise.num_classes:,} classes"
    return index


def sample_checksums(tar: memoryview, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """crc32 of every sample of a tar, uint32 [n]: from its first header to the next sample or the end of the file."""
    ends = [*arrays["start"][1:].tolist(), len(tar)]
    return np.array([zlib.crc32(tar[a:b]) for a, b in zip(arrays["start"].tolist(), ends, strict=True)], "<u4")


def _array_problem(stored: Mapping[str, np.ndarray], needed: Mapping[str, str]) -> str:
    if set(stored) != set(needed):
        return f"arrays {sorted(stored)}, needed are {sorted(needed)}"
    lengths = {array.shape for array in stored.values()}
    if len(lengths) != 1 or len(next(iter(lengths))) != 1 or next(iter(lengths)) == (0,):
        return f"arrays of shapes {sorted(lengths)}; one positive length is needed"
    for name, kind in needed.items():
        if stored[name].dtype.kind != np.dtype(kind).kind or (kind != "S" and stored[name].dtype != np.dtype(kind)):
            return f"{name} is of type {stored[name].dtype}, needed is {kind}"
    return ""


def _sample_problem(arrays: Mapping[str, np.ndarray], tar_size: int) -> str:
    """Every number must be possible and inside the tar; DALI would read whatever it is told."""
    start, offset, size = arrays["start"], arrays["offset"], arrays["size"]
    ordered = np.concatenate([start[:1] >= 0, start[1:] >= (offset + size)[:-1]])
    rules = {
        f"image ends beyond the tar's {tar_size:,} bytes": (offset <= tar_size) & (size <= tar_size - offset),
        "size not positive": size > 0,
        "offset outside its sample or not at a tar block": (offset > start) & (offset % TAR_BLOCK == 0) & ordered,
        "height or width not positive": (arrays["height"] > 0) & (arrays["width"] > 0),
        "label below -1": arrays["label"] >= -1,
        "unknown extension": np.isin(arrays["extension"], [name.encode() for name in IMAGE_EXTENSIONS]),
        "key with other characters than [A-Za-z0-9_-]": np.array([bool(_KEY.fullmatch(k)) for k in arrays["key"]]),
    }
    for problem, good in rules.items():
        if not good.all():
            place = int(np.argmin(good))
            return f"{problem} at sample {place}, key {bytes(arrays['key'][place])!r}"
    return ""


def _rejection(entry: Any) -> Rejection:
    rejection = Rejection(*entry)
    if not all(isinstance(value, str) for value in rejection):
        raise TypeError(f"texts are needed, not {entry!r}")
    return rejection
