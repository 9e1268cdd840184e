"""A tar that somebody else made: where every file in it lies. Strict, fast, and without reading the files.

A tar has no checksum over its data and no table of contents, so all that can be wrong with it must be looked for:
every header's checksum, numbers in their plain form, files that lie inside the tar, an end that is marked (a tar that
was cut between two files looks whole otherwise) and nothing behind it. What is not a regular file is refused and
nothing is ever extracted. One read of 6 kB brings a header, what is small behind it, the next header and an image's
beginning, so a sample costs about one read.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from shards.foreign.stretch import NOWHERE, Place, Stretch
from shards.layout import TAR_BLOCK, DataError, padded
from shards.tar_headers import (
    KIND,
    SIZE,
    named,
    names_of,
    odd_name,
    parse_pax,
    parse_size,
    plain_sizes,
    right_checksums,
)

_READ = 6144  # bytes at once: with a pax header before every file, a sample's headers and its image's beginning
_TOGETHER = 4096  # files whose headers are checked at once
_HEAD = 1024  # bytes of a file's beginning that are kept where they were read anyway
_HASHED = 157  # bytes of a header: name, owner, time, size, checksum of all, kind
_MOST_EXTENDED = 65_536  # bytes of a pax or GNU header: names, times, owners
_LONGEST_NAME = 1024  # bytes
_END = bytes(TAR_BLOCK)
_BLANK = ord(" ")

_REGULAR, _REGULAR_ONCE, _CONTIGUOUS, _FOLDER = ord("0"), 0, ord("7"), ord("5")
_PAX, _PAX_GLOBAL, _LONG_NAME = ord("x"), ord("g"), ord("L")
_REFUSED = {
    ord("1"): "a hard link", ord("2"): "a symbolic link", ord("3"): "a device", ord("4"): "a device",
    ord("6"): "a pipe", ord("S"): "a sparse file", ord("K"): "a link",
}  # fmt: skip
# By a header's field: the size of a pax header that holds one time and nothing else, and how to see that it does.
# WebDataset's writer puts one before every file.
_TIMES = {
    b"%011o\0" % size: (size, re.compile(rb"%d mtime=\d+(?:\.\d+)?\n" % size).fullmatch) for size in range(10, 40)
}
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_AGAIN = "copy or download it again"


class ForeignTar:
    """An open tar, to be used in a `with`."""

    def __init__(self, path: Path) -> None:
        """Raises DataError where there is no such file, or a folder, or nothing in it."""
        self.path = path
        self._headers = hashlib.sha256()
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise self.fault(error.strerror or str(error), "restore the tar") from error
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode) or not self.size:
            os.close(self._descriptor)
            raise self.fault("an empty file" if stat.S_ISREG(status.st_mode) else "not a file")
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # else the kernel reads the images too

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)

    @property
    def headers_sha256(self) -> str:
        """sha256 over all headers, once `stretches` has come to its end.

        Over their first 157 bytes, which end with the checksum of the rest and the kind, and over the data of pax and
        long-name headers.
        """
        return self._headers.hexdigest()

    def read(self, offset: int, size: int) -> bytes:
        """Bytes of the tar; DataError if it ends before."""
        try:
            data = os.pread(self._descriptor, size, offset)
            while 0 < len(data) < size and (more := os.pread(self._descriptor, size - len(data), offset + len(data))):
                data += more
        except OSError as error:
            raise self.fault(f"byte {offset:,}: {error.strerror}") from error
        if len(data) != size:
            raise self.fault(f"cut at byte {offset + len(data):,}")
        return data

    def fault(self, problem: str, remedy: str = _AGAIN) -> DataError:
        """The error that names this tar."""
        return DataError(f"{self.path}: {problem}; {remedy}")

    def stretches(self, begin: int = 0, most: int = _TOGETHER) -> Iterator[tuple[list[bytes], list[Place]]]:
        """Names and places of all regular files from the header at byte `begin` on; folders are left out.

        They come when their headers have been checked, about `most` at a time: so far is read ahead. Raises
        DataError, naming the tar, the place and the file, for anything that is not exactly a whole tar of regular
        files.
        """
        position: int | None = begin
        while position is not None:
            found = Stretch()
            try:
                position = self._collect(position, most, found)
            except DataError:
                self._check(found)  # a damaged header leads astray: then it is the cause
                raise
            except OSError as error:
                raise self.fault(f"behind byte {position:,}: {error.strerror}") from error
            yield self._check(found), found.files

    def _collect(self, position: int, most: int, found: Stretch) -> int | None:
        """Go from header to header; returns the place of the next, or None at the end of the archive.

        Half of the time of indexing is spent here: so files, and the times before them, are noted without a call.
        """
        descriptor, end, files, pending = self._descriptor, self.size, found.files, found.pending
        note, number, times = found.blocks.append, found.blocks.__len__, _TIMES.get
        chunk, base, last = b"", position, -1  # what was read, where it begins, and its last whole block in it
        while True:
            at = position - base
            if at > last:
                if len(files) >= most and found.begin == NOWHERE:
                    return position
                chunk, base, at = os.pread(descriptor, _READ, position), position, 0
                last = len(chunk) - TAR_BLOCK
                if last < 0:
                    raise self._cut(position)
            data = at + TAR_BLOCK
            header = chunk[at:data]
            kind = header[KIND]
            if kind != _REGULAR or pending:
                time = times(header[SIZE]) if kind == _PAX and not pending else None
                if time and time[1](content := chunk[data : data + time[0]]):
                    found.others.append((number(), position))
                    found.contents.append(content)
                    note(header)
                    if found.begin == NOWHERE:
                        found.begin = position
                    position += 2 * TAR_BLOCK
                    continue
                after = self._unusual(chunk[at:], position, found)
                if after is None:
                    return None
                position = after
                continue
            try:
                if header[135] > _BLANK:
                    raise ValueError  # twelve digits, as some programs write them
                size = int(header[124:135], 8)  # `plain_sizes` allows nothing but digits there
            except ValueError:
                size = parse_size(header)
            begin = position if found.begin == NOWHERE else found.begin
            position += TAR_BLOCK
            if not 0 <= size <= end - position:
                raise self._beyond(header, position - TAR_BLOCK)
            note(header)
            files.append((begin, position, size, chunk[data : data + (size if size < _HEAD else _HEAD)]))
            found.begin = NOWHERE
            position += size + TAR_BLOCK - 1 & -TAR_BLOCK

    def _unusual(self, chunk: bytes, position: int, found: Stretch) -> int | None:
        """Whatever is not a file in its plain form; returns the place of the next header, None at the end.

        `chunk` begins with the header and holds what was read behind it.
        """
        header, data = chunk[:TAR_BLOCK], position + TAR_BLOCK
        kind = header[KIND]
        if header == _END:
            self._check_end(position, found)
            return None
        size = parse_size(header)
        if kind in _REFUSED:
            raise self._refusal(header, position, f"is {_REFUSED[kind]}", "images must be regular files: repack it")
        if not 0 <= size <= self.size - data:
            raise self._beyond(header, position)
        if kind in (_PAX, _PAX_GLOBAL, _LONG_NAME):
            self._extend(found, header, position, size, chunk[TAR_BLOCK : TAR_BLOCK + size])
        elif kind in (_REGULAR, _REGULAR_ONCE, _CONTIGUOUS):
            size = self._apply(found, size, position)
            found.add(header, data, size, chunk[TAR_BLOCK : TAR_BLOCK + min(size, _HEAD)])
        elif kind == _FOLDER and not size:
            found.add_folder(header, position)
        else:
            what = "is a folder with data" if kind == _FOLDER else f"is of the unknown kind {chr(kind)!r}"
            raise self._refusal(header, position, what, "repack it")
        return data + padded(size)

    def _refusal(self, header: bytes, position: int, problem: str, remedy: str = _AGAIN) -> DataError:
        """What is wrong with a file, or that its header is damaged, if it is."""
        if not right_checksums(np.frombuffer(header, np.uint8)[None])[0]:
            return self._damaged(header, position)
        return self.fault(f"{named(header, position)} {problem}", remedy)

    def _damaged(self, header: bytes, position: int) -> DataError:
        if not position and header.startswith(_COMPRESSED):
            return self.fault("compressed", "unpack it once (for example gunzip): samples are read in any order")
        return self.fault(f"{named(header, position)}: the header is damaged (checksum or magic)")

    def _beyond(self, header: bytes, position: int) -> DataError:
        size = parse_size(header)
        if size < 0:
            return self._refusal(header, position, f"has the size {header[124:136]!r}: no number, or a negative one")
        return self._refusal(header, position, f"should have {size:,} bytes, the tar has {self.size:,}: it was cut")

    def _extend(self, found: Stretch, header: bytes, position: int, size: int, content: bytes) -> None:
        """Take in a pax or GNU header: what it says holds for the next file."""
        kind, where = header[KIND], f"byte {position + TAR_BLOCK:,}"
        found.add_extended(header, position, begins=kind != _PAX_GLOBAL)
        if size > _MOST_EXTENDED:
            raise self.fault(f"{where}: an extended header of {size:,} bytes; up to {_MOST_EXTENDED:,} are read")
        if len(content) < size:
            content = self.read(position + TAR_BLOCK, size)
        found.contents.append(content)
        records = {b"path": content.rstrip(b"\0")} if kind == _LONG_NAME else parse_pax(content)
        if records is None:
            raise self.fault(f"{where}: a pax header that cannot be read")
        if b"GNU.sparse" in content and any(name.startswith(b"GNU.sparse") for name in records):
            raise self.fault(f"{where}: the next file is sparse", "repack it")
        if kind == _PAX_GLOBAL and records.keys() & {b"path", b"size"}:
            raise self.fault(f"{where}: a global pax header with a name or size for all files", "repack it")
        if kind != _PAX_GLOBAL and records.keys() & {b"path", b"size"}:  # the rest is times and owners
            found.pending.update(records)

    def _apply(self, found: Stretch, size: int, position: int) -> int:
        """What the extended headers before a file say about it; returns its size."""
        name, text = found.pending.get(b"path"), found.pending.get(b"size")
        found.pending.clear()
        if name is not None:
            found.long_name[len(found.files)] = name
        if text is None:
            return size
        if not (text.isdigit() and len(text) <= 18) or int(text) > self.size - position - TAR_BLOCK:
            raise self.fault(f"byte {position:,}: a pax header with the size {text[:30]!r}, the tar has {self.size:,}")
        found.long_size.append(len(found.files))
        return int(text)

    def _cut(self, position: int) -> DataError:
        rest = self.size - position
        if rest == 0:
            return self.fault(
                f"ends at byte {position:,} without the end-of-archive blocks: it may have been cut between two files "
                "and have lost samples",
                f"{_AGAIN}, or repack it if it is known to be whole",
            )
        if not position:
            return self.fault(f"{self.size:,} bytes are no tar")
        where = "inside the header" if rest > 0 else "in the padding"
        return self.fault(f"cut {where} at byte {min(position, self.size):,}")

    def _check_end(self, position: int, found: Stretch) -> None:
        """Two blocks of zeros end a tar, and only zeros may follow."""
        if found.begin != NOWHERE:
            raise self.fault(f"byte {position:,}: an extended header at the end, and no file that it belongs to")
        if self.size - position < 2 * TAR_BLOCK:
            raise self.fault(f"ends at byte {self.size:,} with half of the end-of-archive mark: it was cut")
        for begin in range(position, self.size, 2**20):
            rest = self.read(begin, min(2**20, self.size - begin))
            if rest.count(0) != len(rest):
                raise self.fault(
                    f"more data after its end at byte {position:,}: two tars in one file, or a block of zeros inside",
                    "samples behind it would be lost: repack it",
                )

    def _check(self, found: Stretch) -> list[bytes]:
        """Check every header of a stretch; returns the files' names."""
        if not found.blocks:
            return []
        table = np.frombuffer(b"".join(found.blocks), np.uint8).reshape(-1, TAR_BLOCK)
        self._headers.update(b"".join(found.contents))
        self._headers.update(np.ascontiguousarray(table[:, :_HASHED]))
        right = right_checksums(table)
        if not right.all():
            row = int(np.argmin(right))
            raise self._damaged(found.blocks[row], found.place(row))
        if found.others:
            table = np.delete(table, [row for row, _ in found.others], axis=0)
        right = plain_sizes(table, [size for _, _, size, _ in found.files])
        right[found.long_size] = True
        if not right.all():
            file = int(np.argmin(right))
            header = table[file].tobytes()
            where = named(header, found.files[file][1] - TAR_BLOCK)
            raise self.fault(f"{where} has the size {header[124:136]!r}: not in octal digits")
        return self._checked_names(names_of(table), found)

    def _checked_names(self, names: list[bytes], found: Stretch) -> list[bytes]:
        for number, name in found.long_name.items():
            if len(name) > _LONGEST_NAME:
                problem = f"file {name[:80]!r}...: a name of {len(name):,} bytes; up to {_LONGEST_NAME:,} are read"
                raise self.fault(problem, "repack it")
            names[number] = name
        bad = odd_name(names)
        if bad is not None:
            rule = "names must be relative, without `.`, `..`, `//` and control characters"
            raise self.fault(f"file {bad[:200]!r}: {rule}", "repack it")
        return names
