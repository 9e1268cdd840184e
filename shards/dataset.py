"""A folder of shards as arrays: where each sample's image lies, its label and its size in pixels.

The shards are ours (tools/make_shards.py), or somebody else's with an index of ours (tools/index_shards.py). Sample ids
are positions in these arrays: 0 <= id < N, in the order of the manifest or index. They name a sample for the order,
the draws and the error messages, and they are the same on every machine that holds the same shards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shards.foreign.index_files import TarRecord, command, find_tars, index_file, read_set, read_tar_index
from shards.foreign.samples import moved_sample
from shards.index import ForeignIndex, Promise, ShardIndex, read_promised_index
from shards.layout import MANIFEST, PLAN, DataError, MissingData, ShardRecord, read_manifest, sha256_hex

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
    fingerprint: str  # sha256 over the manifest or index: equal exactly when what that promises is equal

    def __len__(self) -> int:
        return len(self.tar)

    def name(self, sample_id: int) -> str:
        """`tar file:key` of a sample, for messages."""
        return f"{self.paths[self.tar[sample_id]].name}:{self.key[sample_id].decode()}"


@dataclass(frozen=True)
class _Source:
    """What promises the samples of a folder, and how to read and check it."""

    promise: str  # manifest or index
    records: Sequence[ShardRecord | TarRecord]
    paths: tuple[Path, ...]  # of the tars, in the order of the records
    classes: tuple[str, ...]
    fingerprint: str
    read: Callable[[Any], ShardIndex | ForeignIndex | str]  # the index of one tar, or what is wrong with it
    check: Callable[[], Sequence[object]]  # reads all tars; returns findings
    remedy: str  # what to run


def open_dataset(
    folder: Path,
    *,
    check: Literal["quick", "full"] = "quick",
    setting: str = "data",
    progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """The samples of a folder that tools/make_shards.py made or tools/index_shards.py indexed, or of `DIR/PATTERN`.

    `check="quick"` compares every size, count and index with the manifest, and three headers of each tar with its
    index (about a second for ImageNet); `"full"` also reads every tar. `setting` names the folder in messages,
    `progress(done, all)` counts shards.

    Raises MissingData when the folder, its manifest or its index is not there, DataError when something is missing or
    different.
    """
    try:
        source = _foreign(folder) if is_foreign(folder) else _ours(folder)
    except MissingData as error:
        raise MissingData(f"{setting}={error}") from error
    findings = source.check() if check == "full" else ()
    if findings:
        raise DataError(f"{setting}={folder}: {len(findings)} problems, first {findings[0]}; run {source.remedy}")
    readings = []
    with ThreadPoolExecutor(_READERS) as pool:
        for reading in pool.map(source.read, source.records):
            readings.append(reading)
            if progress:
                progress(len(readings), len(source.records))
    problems = {r.name: what for r, what in zip(source.records, readings, strict=True) if isinstance(what, str)}
    indexes = [reading for reading in readings if not isinstance(reading, str)]
    if problems or not indexes:
        raise DataError(f"{setting}={folder}: {_shortfall(source, indexes, problems)}; run {source.remedy}")
    return _joined(folder, source, indexes)


def is_dataset(folder: Path) -> bool:
    """Whether there is a manifest or an index that `open_dataset` would read."""
    return (folder / MANIFEST).is_file() or index_file(folder) is not None


def is_foreign(folder: Path) -> bool:
    """Whether there are tars or an index of them, and no trace of a conversion of ours."""
    ours = (folder / MANIFEST).is_file() or (folder / PLAN).exists()
    return not ours and (index_file(folder) is not None or bool(find_tars(folder)))


def _ours(folder: Path) -> _Source:
    from shards.checking.verify import verify

    manifest = read_manifest(folder)
    return _Source(
        promise="manifest",
        records=manifest.shards,
        paths=tuple(folder / record.file("tar") for record in manifest.shards),
        classes=manifest.classes,
        fingerprint=sha256_hex((folder / MANIFEST).read_bytes()),
        read=lambda record: _read_shard(folder, record, len(manifest.classes)),
        check=lambda: verify(folder),
        remedy=f"tools/verify_shards.py {folder}",
    )


def _foreign(place: Path) -> _Source:
    from shards.foreign.indexing import check_foreign

    opened = read_set(place)
    return _Source(
        promise="index",
        records=opened.index.tars,
        paths=tuple(map(opened.tar, opened.index.tars)),
        classes=opened.index.classes,
        fingerprint=opened.fingerprint,
        read=lambda record: read_tar_index(opened, record),
        check=lambda: check_foreign(place),
        remedy=command(place),
    )


def _read_shard(folder: Path, record: ShardRecord, classes: int) -> ShardIndex | str:
    """The index of one shard, or what is wrong with the shard."""
    promise = Promise(
        source="manifest",
        samples=record.samples,
        tar_size=record.bytes,
        npz_sha256=record.sha256["npz"],
        bound_by=record.sha256["tar"],
        num_classes=classes,
    )
    tar = folder / record.file("tar")
    index = read_promised_index(tar, folder / record.file("npz"), ShardIndex, promise)
    if not isinstance(index, str) and (moved := moved_sample(tar, index)):
        return f"{tar.name} is another tar than that of the manifest: {moved}"
    return index


def _shortfall(source: _Source, indexes: Sequence[ShardIndex | ForeignIndex], problems: Mapping[str, str]) -> str:
    promised, found = sum(record.samples for record in source.records), sum(map(len, indexes))
    first = ", ".join(f"{name.removeprefix('shard-')}: {what}" for name, what in list(problems.items())[:_NAMED])
    more = " ..." if len(problems) > _NAMED else ""
    short = f" ({len(problems)} shards short: {first}{more})" if problems else ""
    return f"{source.promise} promises {promised:,} samples, indexes hold {found:,}{short}"


def _joined(folder: Path, source: _Source, indexes: Sequence[ShardIndex | ForeignIndex]) -> Dataset:
    lengths = list(map(len, indexes))
    columns = {
        name: np.concatenate([index.arrays[name] for index in indexes])
        for name in ("offset", "size", "label", "height", "width", "key")
    }
    return Dataset(
        folder=folder,
        paths=source.paths,
        tar=np.repeat(np.arange(len(indexes), dtype=np.int32), lengths),
        classes=source.classes,
        fingerprint=source.fingerprint,
        **columns,
    )
