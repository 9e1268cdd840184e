"""Our index of one tar: where each image lies, what it is, and the checksums that bind the index to its tar.

One `.npz` per tar, so that a million samples open in about a second and every number has one type. `meta` holds the
tar's size and sha256 and the hash of the shard's part of the plan; `rejected` the images that were left out of this
shard, so that a rerun need not look at them again. The bytes depend on the content only.
"""

from __future__ import annotations

import io
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shards.layout import IMAGE_EXTENSIONS, TAR_BLOCK, DataError, Rejection

_ARRAYS = {
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
_META = {"tar_size": int, "tar_sha256": str, "dali_sha256": str, "plan_sha256": str}


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """n samples of one tar, in its order. Arrays [n] as in `_ARRAYS`."""

    tar_size: int  # bytes
    tar_sha256: str
    dali_sha256: str  # of the .idx beside the tar
    plan_sha256: str  # of the part of the plan that the shard was made from
    arrays: Mapping[str, np.ndarray] = field(repr=False)
    rejected: tuple[Rejection, ...] = ()

    def __len__(self) -> int:
        return len(self.arrays["offset"])


def format_index(index: ShardIndex) -> bytes:
    """The bytes of the `.npz`."""
    meta = {name: getattr(index, name) for name in _META}
    stream = io.BytesIO()
    arrays = {name: np.asarray(index.arrays[name]).astype(kind) for name, kind in _ARRAYS.items()}
    texts = {"meta": json.dumps(meta, sort_keys=True), "rejected": json.dumps(index.rejected)}
    np.savez(stream, **arrays, **{name: np.frombuffer(text.encode("ascii"), np.uint8) for name, text in texts.items()})
    return stream.getvalue()


def parse_index(data: bytes, file: Path) -> ShardIndex:
    """Read the bytes of an index strictly; raises DataError, naming `file` and where it can the sample's key."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            stored = {name: archive[name] for name in archive.files}
        texts = {name: json.loads(stored.pop(name).tobytes().decode("ascii")) for name in ("meta", "rejected")}
    except Exception as error:  # zipfile, numpy and json raise a dozen kinds on damaged bytes
        raise DataError(f"{file}: not a readable index: {error or type(error).__name__}; {_remedy(file)}") from error
    _check_arrays(stored, file)
    meta = texts["meta"]
    if not isinstance(meta, dict) or {name: type(value) for name, value in meta.items()} != _META:
        raise DataError(f"{file}: meta holds {meta!r}; {_remedy(file)}")
    _check_samples(stored, meta["tar_size"], file)
    try:
        rejected = tuple(_rejection(entry) for entry in texts["rejected"])
    except TypeError as error:
        raise DataError(f"{file}: the list of rejected images is damaged; {_remedy(file)}") from error
    return ShardIndex(**meta, arrays=stored, rejected=rejected)


def sample_checksums(tar: memoryview, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """crc32 of every sample of a tar, uint32 [n]: from its first header to the next sample or the end of the file."""
    ends = [*arrays["start"][1:].tolist(), len(tar)]
    return np.array([zlib.crc32(tar[a:b]) for a, b in zip(arrays["start"].tolist(), ends, strict=True)], "<u4")


def _check_arrays(stored: Mapping[str, np.ndarray], file: Path) -> None:
    if set(stored) != set(_ARRAYS):
        raise DataError(f"{file}: arrays {sorted(stored)}, needed are {sorted(_ARRAYS)}; {_remedy(file)}")
    lengths = {array.shape for array in stored.values()}
    if len(lengths) != 1 or len(next(iter(lengths))) != 1 or next(iter(lengths)) == (0,):
        raise DataError(f"{file}: arrays of shapes {sorted(lengths)}; one positive length is needed; {_remedy(file)}")
    for name, kind in _ARRAYS.items():
        if stored[name].dtype.kind != np.dtype(kind).kind or (kind != "S" and stored[name].dtype != np.dtype(kind)):
            raise DataError(f"{file}: {name} is of type {stored[name].dtype}, needed is {kind}; {_remedy(file)}")


def _check_samples(arrays: Mapping[str, np.ndarray], tar_size: int, file: Path) -> None:
    """Every number possible and inside the tar; DALI would read whatever it is told."""
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
            raise DataError(
                f"{file}: {problem} at sample {place}, key {bytes(arrays['key'][place])!r}; {_remedy(file)}"
            )


def _rejection(entry: Any) -> Rejection:
    rejection = Rejection(*entry)
    if not all(isinstance(value, str) for value in rejection):
        raise TypeError(f"texts are needed, not {entry!r}")
    return rejection


def _remedy(file: Path) -> str:
    return f"delete {file.name} and run tools/make_shards.py again"
