"""Is a folder of shards still what its manifest promises? Every byte of every file is covered.

The manifest carries its own checksum and the sha256 of every other file, so any change is found; the index's crc32 of
each sample then tells which sample it hit, and the tar's headers are read with `tarfile` and compared with both
indexes. `quick` leaves out what needs all bytes of the tars, and looks at three headers of each; `decode` adds what no
hash tells: that every image still decodes in the libraries of this machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from shards.checking.decode_check import undecodable
from shards.checking.tar_contents import mapped, read_contents
from shards.dali_index import Member, format_dali_index, parse_dali_index
from shards.foreign.samples import moved_sample
from shards.index import ShardIndex, parse_index, sample_checksums
from shards.layout import (
    MANIFEST,
    OTHER_FILES,
    SHARD_SUFFIXES,
    TAR_BLOCK,
    DataError,
    Manifest,
    ShardRecord,
    read_manifest,
    sha256_hex,
)

HASHING_THREADS = 8  # hashing does not hold Python's lock; more would wait for the disk


class Finding(NamedTuple):
    """One thing that is wrong."""

    file: str
    key: str  # of the sample, where the problem is in one
    problem: str

    def __str__(self) -> str:
        return f"{self.file}{':' if self.key else ''}{self.key}: {self.problem}"


def verify(
    folder: Path, *, quick: bool = False, decode: bool = False, progress: Callable[[int, int], None] | None = None
) -> list[Finding]:
    """Everything that is wrong with `folder`; empty when all is well. `progress(done, all)` counts bytes of tars.

    Raises MissingData when there is no folder or no manifest: then nothing is promised. ValueError for `quick` and
    `decode` together.
    """
    if quick and decode:
        raise ValueError("quick=True: leaves the images unread, decode=True needs them; choose one")
    try:
        manifest = read_manifest(folder)
    except DataError as error:
        if not (folder / MANIFEST).exists():
            raise
        return [Finding(MANIFEST, "", str(error))]
    findings = list(_check_names(folder, manifest))
    owners = {digest: r.file(suffix) for r in manifest.shards for suffix, digest in r.sha256.items()}
    read = "nothing" if quick else "images" if decode else "bytes"
    done, total = 0, sum(record.bytes for record in manifest.shards)
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores if decode else min(HASHING_THREADS, cores)) as pool:
        reports = pool.map(lambda record: list(_check_shard(folder, record, manifest, owners, read)), manifest.shards)
        for record, report in zip(manifest.shards, reports, strict=True):
            findings += report
            done += record.bytes
            if progress:
                progress(done, total)
    return findings + list(_check_keys(folder, manifest))


def _check_names(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """Missing and extra files, and the small files beside the shards."""
    shards = {record.file(suffix) for record in manifest.shards for suffix in SHARD_SUFFIXES}
    present = set(os.listdir(folder))
    for name in sorted(present - shards - {MANIFEST, *manifest.files}):
        yield Finding(name, "", "extra: not in the manifest")
    for name in sorted(set(OTHER_FILES) - set(manifest.files)):
        yield Finding(MANIFEST, "", f"does not cover {name}")
    for name, digest in manifest.files.items():
        try:
            if sha256_hex((folder / name).read_bytes()) != digest:
                yield Finding(name, "", "changed: sha256 differs from the manifest")
        except OSError as error:
            yield _unreadable(name, error)


def _check_shard(
    folder: Path, record: ShardRecord, manifest: Manifest, owners: Mapping[str, str], read: str
) -> Iterator[Finding]:
    """The three files of one shard; `read`: nothing, bytes or images of the tar."""
    contents: dict[str, bytes] = {}
    for suffix in ("npz", "idx"):
        name = record.file(suffix)
        try:
            contents[suffix] = (folder / name).read_bytes()
        except OSError as error:
            yield _unreadable(name, error)
            continue
        found = sha256_hex(contents[suffix])
        if found != record.sha256[suffix]:
            line = _wrong_line(contents["idx"], record.bytes) if suffix == "idx" and found not in owners else ""
            yield Finding(name, "", _difference(found, owners) + line)
    index = None
    try:
        index = parse_index(contents["npz"], folder / record.file("npz")) if "npz" in contents else None
    except DataError as error:
        yield Finding(record.file("npz"), "", str(error))
    if index:
        yield from _check_index(record, index, manifest)
    tar = folder / record.file("tar")
    try:
        found = list(_check_tar(tar, record, index, contents, owners, quick=read == "nothing"))
        yield from found
        if read == "images" and index and not found:
            for key, problem in undecodable(tar, index, manifest.plan["max_pixels"]):
                yield Finding(tar.name, key, problem)
    except OSError as error:
        yield _unreadable(record.file("tar"), error)


def _check_index(record: ShardRecord, index: ShardIndex, manifest: Manifest) -> Iterator[Finding]:
    name = record.file("npz")
    if len(index) != record.samples:
        yield Finding(name, "", f"holds {len(index):,} samples, the manifest promises {record.samples:,}")
    if index.tar_sha256 != record.sha256["tar"]:
        yield Finding(name, "", "stale or foreign: bound to another tar")
    top = int(index.arrays["label"].max())
    if top >= len(manifest.classes):
        yield Finding(name, "", f"labels up to {top}, there are {len(manifest.classes)} classes")


def _check_tar(
    file: Path,
    record: ShardRecord,
    index: ShardIndex | None,
    contents: Mapping[str, bytes],
    owners: Mapping[str, str],
    *,
    quick: bool,
) -> Iterator[Finding]:
    size = file.stat().st_size
    if size != record.bytes:
        yield Finding(file.name, "", f"{size:,} bytes, the manifest promises {record.bytes:,}")
    elif quick and index and (moved := moved_sample(file, index)):
        yield Finding(file.name, "", f"another tar, or another index: {moved}")
    if quick:
        return
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != record.sha256["tar"]:
        damaged = list(_damaged_samples(file, index)) if index and found not in owners else []
        yield from damaged or [Finding(file.name, "", _difference(found, owners))]
    elif index:
        yield from _check_headers(file, index, contents.get("idx"))


def _damaged_samples(file: Path, index: ShardIndex) -> Iterator[Finding]:
    """Which samples of a changed tar are not as they were written."""
    if file.stat().st_size != index.tar_size:
        return
    with mapped(file) as tar:
        found = sample_checksums(tar, index.arrays)
    for key, good in zip(index.arrays["key"], found == index.arrays["crc32"], strict=True):
        if not good:
            yield Finding(file.name, key.decode(), "changed: crc32 differs from the index")


def _check_headers(file: Path, index: ShardIndex, dali: bytes | None) -> Iterator[Finding]:
    """Both indexes against what the tar itself says."""
    try:
        samples, about = read_contents(file)
    except (tarfile.TarError, OSError) as error:
        yield Finding(file.name, "", f"not a readable tar: {error}")
        return
    if list(samples) != [key.decode() for key in index.arrays["key"]]:
        yield Finding(file.name, "", f"its {len(samples):,} keys are not the {len(index):,} of the index, in order")
        return
    for position, (key, members) in enumerate(samples.items()):
        row = {name: array[position] for name, array in index.arrays.items()}
        problem = _row_problem(row, members, about[key])
        if problem:
            yield Finding(file.name, key, problem)
    if dali is not None and format_dali_index(list(samples.values())).encode() != dali:
        yield Finding(file.with_suffix(".idx").name, "", "stale or foreign: does not describe its tar")


def _row_problem(row: Mapping[str, Any], members: list[Member], about: Mapping[str, bytes]) -> str:
    """What the index says wrongly about one sample, or nothing."""
    image = Member(row["extension"].decode(), int(row["offset"]), int(row["size"]), members[0].name)
    found = {member.extension: (member.offset, member.size) for member in members}
    if found.get(image.extension) != (image.offset, image.size):
        return f"index has {image.extension} at {image.offset} with {image.size} bytes, the tar has {found}"
    if members[0].offset - TAR_BLOCK != row["start"]:
        return f"index begins it at {row['start']}, the tar at {members[0].offset - TAR_BLOCK}"
    if about.get("cls") != (str(row["label"]).encode() if row["label"] >= 0 else None):
        return f"index has label {row['label']}, the tar {about.get('cls')!r}"
    try:
        stored = json.loads(about.get("json", b""))
        told = {name: stored[name] for name in ("label", "height", "width")}
    except (ValueError, TypeError, KeyError) as error:
        return f"its json member is damaged: {error}"
    if told != {name: int(row[name]) for name in told}:
        return f"its json member says {told}, the index otherwise"
    return ""


def _check_keys(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """A key may name one sample only in the whole folder."""
    seen: dict[bytes, str] = {}
    for record in manifest.shards:
        try:
            index = parse_index((folder / record.file("npz")).read_bytes(), folder / record.file("npz"))
        except (OSError, DataError):
            continue  # reported with its shard
        for key in index.arrays["key"].tolist():
            other = seen.setdefault(key, record.file("tar"))
            if other != record.file("tar"):
                yield Finding(record.file("tar"), key.decode(), f"the same key as in {other}")


def _difference(found: str, owners: Mapping[str, str]) -> str:
    if found in owners:
        return f"swapped: it is {owners[found]}"
    return "changed: sha256 differs from the manifest"


def _wrong_line(dali: bytes, tar_size: int) -> str:
    """The first line of an index of DALI's that no tar of this size can have, or nothing."""
    try:
        parse_dali_index(dali.decode("ascii", "replace"), "", tar_size)
    except DataError as error:
        return f"; {str(error).removeprefix(': ')}"
    return ""


def _unreadable(name: str, error: OSError) -> Finding:
    missing = isinstance(error, FileNotFoundError)
    return Finding(name, "", "missing" if missing else f"cannot be read: {error.strerror}")
