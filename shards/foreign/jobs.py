"""What is done with one tar that somebody else made, in one process: index it, or compare it with its index."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.checking.decode_check import undecodable
from shards.checking.verify import Finding
from shards.foreign.index_files import OpenedSet, TarRecord, npz_name, read_tar_index
from shards.foreign.samples import index_tar
from shards.image_headers import MAX_PIXELS
from shards.index import ForeignIndex, format_index
from shards.layout import DataError, Rejection, sha256_hex
from shards.making.writer import HIDDEN_SUFFIX


@dataclass(frozen=True)
class Indexed:
    """What was found in one tar."""

    record: TarRecord
    keys: np.ndarray  # S [n], escaped
    top: tuple[int, str]  # highest label, and its sample
    components: Counter[str]
    label_keys: dict[str, str]
    class_names: dict[int, str]
    rejected: tuple[Rejection, ...]
    written: bool


def make_index(tar: Path, home: Path) -> Indexed:
    """Index one tar; its file in `home` is written unless it is there already. Raises DataError as `index_tar` does."""
    contents = index_tar(tar)
    index, data = contents.index, format_index(contents.index)
    record = TarRecord(
        name=tar.name,
        samples=len(index),
        bytes=index.tar_size,
        headers_sha256=index.headers_sha256,
        npz_sha256=sha256_hex(data),
    )
    labels, keys = index.arrays["label"], index.arrays["key"]
    top = int(labels.max()), keys[labels.argmax()].decode()
    written = write_if_new(home / npz_name(tar.name), data)
    return Indexed(
        record, keys, top, contents.components, contents.label_keys, contents.class_names, index.rejected, written
    )


def write_if_new(file: Path, data: bytes) -> bool:
    """Write a read-only file, complete or not at all; False if it holds just that already.

    It is not flushed to the disk, which would cost more than to index: what a power cut spoils does not have its hash.
    """
    try:
        if file.read_bytes() == data:
            return False
    except OSError:
        pass
    descriptor, hidden = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=HIDDEN_SUFFIX)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(data)
            os.fchmod(stream.fileno(), 0o444)
        os.replace(hidden, file)
    finally:
        Path(hidden).unlink(missing_ok=True)
    return True


def check_tar(opened: OpenedSet, record: TarRecord, decode: bool) -> list[Finding]:
    """Index a tar again and compare; with `decode`, decode every image as training does."""
    tar, npz = opened.tar(record), opened.npz(record)
    findings, stored = [], None
    try:
        answer = read_tar_index(opened, record)
        if isinstance(answer, str):
            findings.append(Finding(record.name, "", answer))
        else:
            stored = answer
    except DataError as error:
        findings.append(Finding(npz.name, "", str(error).removeprefix(f"{npz}: ")))
    try:
        found = index_tar(tar).index
    except DataError as error:
        return [*findings, Finding(record.name, "", str(error).removeprefix(f"{tar}:").strip())]
    if stored is not None:
        findings += _differences(record.name, stored, found)
    if decode:
        findings += [Finding(record.name, key, problem) for key, problem in undecodable(tar, found, MAX_PIXELS)]
    return findings


def _differences(name: str, stored: ForeignIndex, found: ForeignIndex) -> Iterator[Finding]:
    """What the index says otherwise than the tar."""
    keys = stored.arrays["key"], found.arrays["key"]
    if len(stored) != len(found) or (keys[0] != keys[1]).any():
        yield Finding(name, "", f"its {len(found):,} keys are not the {len(stored):,} of the index, in order")
        return
    same = np.ones(len(found), bool)
    for column in ForeignIndex.ARRAYS:
        differs = stored.arrays[column] != found.arrays[column]
        for row in np.flatnonzero(differs & same):
            told, seen = stored.arrays[column][row], found.arrays[column][row]
            yield Finding(name, keys[1][row].decode(), f"index has {column} {told}, the tar {seen}")
        same &= ~differs
    if same.all() and stored.headers_sha256 != found.headers_sha256:
        yield Finding(name, "", "its headers changed since it was indexed, though not where its samples lie")
    if stored.rejected != found.rejected:
        yield Finding(name, "", "the list of rejected images is another than that of the index")
