"""DALI's text index of a tar (`.idx`), written and read strictly.

    v1.2 2
    cls 512 1 cat_1.cls jpg 1536 93021 cat_1.jpg json 95232 76 cat_1.json
    cls ...

One line per sample, (extension, offset of the data, bytes, file name) per member; v1.0 and v1.1 have no names. DALI
itself believes whatever stands there: a negative size ends the process, a stale offset gives garbage. So a foreign
index is parsed here before DALI sees it. The format is that of NVIDIA's `wds2idx`, byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from shards.layout import TAR_BLOCK, DataError

_HEAD = re.compile(r"v1\.([012]) ([0-9]{1,15})", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Member(NamedTuple):
    """One file of a sample inside its tar."""

    extension: str  # what follows the first dot of the file's name
    offset: int  # of the data, in bytes
    size: int  # bytes
    name: str  # empty in v1.0 and v1.1


def format_dali_index(samples: Sequence[Iterable[Member]]) -> str:
    """The index text (v1.2) for samples in the order of the tar."""
    lines = (" ".join(f"{m.extension} {m.offset} {m.size} {m.name}" for m in sample) for sample in samples)
    return "".join(f"{line}\n" for line in (f"v1.2 {len(samples)}", *lines))


def parse_dali_index(text: str, file: Path | str = "index", tar_size: int | None = None) -> list[tuple[Member, ...]]:
    """Read an index of version 1.0, 1.1 or 1.2 strictly.

    Raises DataError, naming `file`, the line and the sample, unless every count, offset and size is possible (inside
    `tar_size` bytes, where that is given) and every name agrees with its extension and its sample.
    """
    if not text.endswith("\n"):
        raise DataError(f"{file}: the last line has no end: the file was cut; make the index again")
    first, *lines = text[:-1].split("\n")
    head = _HEAD.fullmatch(first)
    if not head:
        raise DataError(f"{file}: line 1 is {first[:40]!r}; `v1.2 NUMBER_OF_SAMPLES` is needed (v1.0 to v1.2)")
    if int(head[2]) != len(lines) or not lines:
        raise DataError(f"{file}: line 1 promises {int(head[2]):,} samples, {len(lines):,} lines follow")
    fields = 4 if head[1] == "2" else 3
    return [_sample(line, fields, f"{file}: line {number}", tar_size) for number, line in enumerate(lines, start=2)]


def _sample(line: str, fields: int, where: str, tar_size: int | None) -> tuple[Member, ...]:
    words = line.split(" ")
    if not all(words) or len(words) % fields or _CONTROL.search(line):
        names = " name" if fields == 4 else ""
        raise DataError(f"{where} is {line[:60]!r}; groups of `extension offset size{names}` are needed")
    members = tuple(_member(words[at : at + fields], where, tar_size) for at in range(0, len(words), fields))
    if len({member.extension for member in members}) != len(members):
        raise DataError(f"{where}: an extension twice in one sample: {line[:60]!r}")
    if fields == 4 and len({_key(member.name) for member in members}) != 1:
        raise DataError(f"{where}: names of different samples: {line[:60]!r}")
    return members


def _member(words: list[str], where: str, tar_size: int | None) -> Member:
    extension, offset, size, *name = words
    if not (_NUMBER.fullmatch(offset) and _NUMBER.fullmatch(size)):
        raise DataError(f"{where}: {extension} {offset[:30]} {size[:30]}: offset and size must be whole numbers")
    member = Member(extension, int(offset), int(size), name[0] if name else "")
    if member.offset % TAR_BLOCK or not member.size:
        raise DataError(f"{where}: {member}: offsets are multiples of {TAR_BLOCK} and sizes positive")
    if tar_size is not None and member.offset + member.size > tar_size:
        raise DataError(f"{where}: {member} ends beyond its tar of {tar_size:,} bytes: the index is of another tar")
    if name and member.name != f"{_key(member.name)}.{extension}":
        raise DataError(f"{where}: the name {member.name[:60]!r} does not end in .{extension}")
    return member


def _key(name: str) -> str:
    """Everything before the first dot of the file's name, with its folder."""
    return name[: len(name) - len(name.rpartition("/")[2])] + name.rpartition("/")[2].partition(".")[0]
