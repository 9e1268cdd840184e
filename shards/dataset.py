"""A folder of shards as arrays: where each sample's image lies, its label and its size in pixels.

Sample ids are positions in these arrays: 0 <= id < N, in the order of the manifest. They name a sample for the order,
the draws and the error messages, and they are the same on every machine that holds the same shards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from shards.index import ShardIndex, parse_index
from shards.layout import MANIFEST, DataError, Manifest, MissingData, ShardRecord, read_manifest, sha256_hex

_NAMED = 3  # shards named in a message
_READERS = 8  # threads: the files are small and the wait is for the disk


@dataclass(frozen=True, eq=False)
class Dataset:
    """N samples in T tars. All arrays have N entries but `paths`."""

    folder: Path
    paths: tuple[Path, ...]  # [T] the tars
    tar: np.ndarray  # int32, index into `paths`
    offset: np.ndarray  # int64, first byte of the image inside its tar, a multiple of 512
    size: np.ndarray  # int64, bytes of the image
    label: np.ndarray  # int32, class index, -1 for none
    height: np.ndarray  # int32, pixels as stored (no EXIF rotation)
    width: np.ndarray  # int32
    key: np.ndarray  # bytes (numpy S), the sample's key inside its tar
    classes: tuple[str, ...]  # names by class index; empty for unlabelled data
    fingerprint: str  # sha256 over the manifest: equal exactly when the data are equal

    def __len__(self) -> int:
        return len(self.tar)

    def name(self, sample_id: int) -> str:
        """`tar file:key` of a sample, for messages."""
        return f"{self.paths[self.tar[sample_id]].name}:{self.key[sample_id].decode()}"


def open_dataset(
    folder: Path,
    *,
    check: Literal["quick", "full"] = "quick",
    setting: str = "data",
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """The samples of a folder that tools/make_shards.py made.

    `check="quick"` compares every size, count and index with the manifest (about a second for ImageNet); `"full"`
    also reads every tar. `setting` names the folder in messages, `progress(done, all)` counts shards.

    Raises MissingData when the folder or its manifest is not there, DataError when something is missing or different.
    """
    try:
        manifest = read_manifest(folder)
    except MissingData as error:
        raise MissingData(f"{setting}={error}") from error
    if check == "full":
        _check_fully(folder, setting)
    readings = []
    with ThreadPoolExecutor(_READERS) as pool:
        for reading in pool.map(lambda record: _read_shard(folder, record, len(manifest.classes)), manifest.shards):
            readings.append(reading)
            if progress:
                progress(len(readings), len(manifest.shards))
    problems = {r.name: what for r, what in zip(manifest.shards, readings, strict=True) if isinstance(what, str)}
    indexes = [reading for reading in readings if isinstance(reading, ShardIndex)]
    if problems or not indexes:
        raise DataError(f"{setting}={folder}: {_shortfall(manifest, indexes, problems)}; {_advice(folder)}")
    return _joined(folder, manifest, indexes)


def _read_shard(folder: Path, record: ShardRecord, classes: int) -> ShardIndex | str:
    """The index of one shard, or what is wrong with the shard."""
    tar, file = folder / record.file("tar"), folder / record.file("npz")
    try:
        tar_size = os.stat(tar).st_size
        data = file.read_bytes()
    except OSError as error:
        return f"{os.path.basename(error.filename)} {error.strerror}"
    if tar_size != record.bytes:
        return f"{tar.name} has {tar_size:,} bytes, not {record.bytes:,}"
    if sha256_hex(data) != record.sha256["npz"]:
        return f"{file.name} is another index than the manifest's"
    index = parse_index(data, file)
    if (len(index), index.tar_size, index.tar_sha256) != (record.samples, record.bytes, record.sha256["tar"]):
        return f"{file.name} is the index of another tar"
    if index.arrays["label"].max() >= classes:
        return f"{file.name} has labels up to {index.arrays['label'].max()}, there are {classes} classes"
    return index


def _shortfall(manifest: Manifest, indexes: Sequence[ShardIndex], problems: dict[str, str]) -> str:
    found = sum(map(len, indexes))
    first = ", ".join(f"{name.removeprefix('shard-')}: {what}" for name, what in list(problems.items())[:_NAMED])
    more = " ..." if len(problems) > _NAMED else ""
    short = f" ({len(problems)} shards short: {first}{more})" if problems else ""
    return f"manifest promises {manifest.samples:,} samples, indexes hold {found:,}{short}"


def _advice(folder: Path) -> str:
    return f"run tools/verify_shards.py {folder}"


def _check_fully(folder: Path, setting: str) -> None:
    from shards.verify import verify

    findings = verify(folder)
    if findings:
        raise DataError(f"{setting}={folder}: {len(findings)} problems, first {findings[0]}; {_advice(folder)}")


def _joined(folder: Path, manifest: Manifest, indexes: Sequence[ShardIndex]) -> Dataset:
    lengths = list(map(len, indexes))
    columns = {
        name: np.concatenate([index.arrays[name] for index in indexes])
        for name in ("offset", "size", "label", "height", "width", "key")
    }
    return Dataset(
        folder=folder,
        paths=tuple(folder / record.file("tar") for record in manifest.shards),
        tar=np.repeat(np.arange(len(indexes), dtype=np.int32), lengths),
        classes=manifest.classes,
        fingerprint=sha256_hex((folder / MANIFEST).read_bytes()),
        **columns,
    )
