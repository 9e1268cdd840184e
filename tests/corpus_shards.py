"""Shards of ours that were damaged after they had been made: each with what verification and a run say of it."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from corpus_entries import BadFolder
from foreign_sets import BLOCK, data_end, patched, write_tar

from shards.index import ShardIndex, format_index, parse_index
from shards.layout import parse_manifest, sha256_hex

TAR, IDX, NPZ = "shard-000001.tar", "shard-000001.idx", "shard-000001.npz"
OTHER = "shard-000000"
Members = list[tuple[str, bytes]]


def damages() -> Iterator[BadFolder]:
    """All of them, to be done to a folder of three shards with some samples each."""
    yield from _tars()
    yield from _files()
    yield from _dali_indexes()
    yield from _indexes()
    yield from _manifests()
    yield from _forged()


def _changed(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / name).chmod(0o644)
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return make


def _image_at(folder: Path) -> int:
    """Where the first image of the tar begins."""
    return int(_index(folder).arrays["offset"][0])


def _index(folder: Path, name: str = NPZ) -> ShardIndex:
    return parse_index((folder / name).read_bytes(), folder / name)


def _flip(where: Callable[[Path], int]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        at = where(folder)
        _changed(TAR, lambda tar: tar[:at] + bytes([tar[at] ^ 4]) + tar[at + 1 :])(folder)

    return make


def _tars() -> Iterator[BadFolder]:
    """`quick`: the size tells; else only what reads all bytes."""
    named = r"shard-000001\.tar"
    sample = rf"{named}:n0\d+_\d+: changed: crc32"
    flips: dict[str, Callable[[Path], int]] = {
        "pixels flipped": lambda folder: _image_at(folder) + 500,
        "header of an image flipped": lambda folder: _image_at(folder) + 3,
        "name flipped": lambda folder: int(_index(folder).arrays["start"][0]),
        "label flipped": lambda folder: int(_index(folder).arrays["start"][0]) + BLOCK,
        "padding flipped": lambda folder: int(_index(folder).arrays["start"][1]) - 1,
        "last byte flipped": lambda folder: (folder / TAR).stat().st_size - 1,
    }
    for name, where in flips.items():
        yield BadFolder(name, sample, 10, _flip(where), quick=False)
    for name, at, value in (("huge size", 124, b"77777777777\0"), ("negative size", 124, b"-0000000010\0")):
        yield BadFolder(name, sample, 35, _changed(TAR, lambda t, a=at, v=value: patched(t, 0, a, v)), quick=False)
    yield BadFolder(
        "checksum", sample, 35, _changed(TAR, lambda tar: patched(tar, 0, 148, b"1", checksum=False)), False
    )
    blank = _changed(TAR, lambda tar: tar[:BLOCK] + bytes(BLOCK) + tar[2 * BLOCK :])
    yield BadFolder("a block of zeros written inside", sample, 34, blank, quick=False)
    cuts: dict[str, Callable[[Path], int]] = {
        "cut in an image": lambda folder: _image_at(folder) + 700,
        "cut in a header": lambda folder: _image_at(folder) - 100,
        "cut between samples": lambda folder: int(_index(folder).arrays["start"][1]),
        "cut before the end": lambda folder: data_end(folder / TAR),
        "cut by a byte": lambda folder: (folder / TAR).stat().st_size - 1,
        "emptied": lambda folder: 0,
    }
    for name, where in cuts.items():
        make = lambda folder, at=where: _changed(TAR, lambda tar: tar[: at(folder)])(folder)  # noqa: E731
        yield BadFolder(name, rf"{named}: [\d,]+ bytes, the manifest promises", 33, make)
    yield BadFolder("twice in one", rf"{named}: [\d,]+ bytes, the manifest", 34, _changed(TAR, lambda tar: tar + tar))
    yield BadFolder("grown by zeros", rf"{named}: [\d,]+ bytes", 34, _changed(TAR, lambda tar: tar + bytes(10_240)))
    inside = _changed(TAR, lambda tar: tar[:BLOCK] + bytes(BLOCK) + tar[BLOCK:])
    yield BadFolder("a block of zeros put inside", rf"{named}: [\d,]+ bytes", 34, inside)
    yield BadFolder("compressed", rf"{named}: [\d,]+ bytes", 36, _changed(TAR, gzip.compress))


def _files() -> Iterator[BadFolder]:
    def folder_instead(folder: Path) -> None:
        (folder / TAR).unlink()
        (folder / TAR).mkdir()

    def swapped(suffix: str) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            one, other = folder / f"shard-000001.{suffix}", folder / f"{OTHER}.{suffix}"
            os.rename(one, folder / "aside")
            os.rename(other, one)
            os.rename(folder / "aside", other)

        return make

    for name in (TAR, NPZ, IDX):
        gone = rf"{name}: missing"
        make = lambda folder, name=name: (folder / name).unlink()  # noqa: E731
        yield BadFolder(f"{name} missing", gone, 36, make, run=name != IDX)
    for name in ("plan.json", "quarantine.jsonl", "_info.json"):
        make = lambda folder, name=name: (folder / name).unlink()  # noqa: E731
        yield BadFolder(f"{name} missing", rf"{name}: missing", 36, make, run=False)
    extra = lambda folder: shutil.copy(folder / TAR, folder / "shard-000007.tar")  # noqa: E731
    yield BadFolder("a shard too many", r"shard-000007\.tar: extra: not in the manifest", 36, extra, run=False)
    yield BadFolder("a folder instead", r"shard-000001\.tar: cannot be read: Is a directory|bytes", 36, folder_instead)
    yield BadFolder("tars swapped", r"shard-00000[01]\.tar: (swapped|[\d,]+ bytes)", 36, swapped("tar"))
    yield BadFolder("our indexes swapped", r"shard-00000[01]\.npz: swapped: it is", 37, swapped("npz"))
    yield BadFolder("DALI's indexes swapped", r"shard-00000[01]\.idx: swapped: it is", 37, swapped("idx"), run=False)


def _dali_indexes() -> Iterator[BadFolder]:
    """Only readers of other people use them; what is wrong is said by line."""
    changed = r"shard-000001\.idx: changed: sha256 differs from the manifest"
    line = rf"{changed}; line \d+"

    def words(change: Callable[[list[str]], None], row: int = 1) -> Callable[[bytes], bytes]:
        def edited(data: bytes) -> bytes:
            lines = data.decode().split("\n")
            parts = lines[row].split(" ")
            change(parts)
            lines[row] = " ".join(parts)
            return "\n".join(lines).encode()

        return edited

    def at(place: int, value: str, row: int = 1) -> Callable[[bytes], bytes]:
        return words(lambda parts: parts.__setitem__(place, value), row)

    cases: dict[str, tuple[Callable[[bytes], bytes], str, int]] = {
        "empty": (lambda data: b"", changed, 38),
        "garbage": (lambda data: b"\xff\xfe" * 99, changed, 38),
        "another version": (lambda data: b"v9.9" + data[4:], line, 38),
        "a count too large": (lambda data: b"v1.2 9" + data[6:], line, 38),
        "a count too small": (lambda data: b"v1.2 1" + data[6:], line, 38),
        "a count of 1e14": (lambda data: b"v1.2 100000000000000" + data[6:], line, 39),
        "cut in a line": (lambda data: data[:-20], changed, 38),
        "a zero byte": (lambda data: data[:20] + b"\0" + data[21:], line, 38),
        "a space in a name": (lambda data: data.replace(b".cls", b" .cls", 1), line, 38),
        "negative offset": (at(1, "-512"), line, 39),
        "offset beyond": (at(1, "51200000"), line, 39),
        "offset between blocks": (at(1, "513"), line, 39),
        "negative size": (at(2, "-1"), line, 39),
        "size of 1e11": (at(2, "100000000000"), line, 39),
        "size of zero": (at(2, "0"), line, 39),
        "shifted by a block": (at(1, "1024"), changed, 37),
        "of the earlier tar": (lambda data: data.replace(b" 512 ", b" 1536 ", 1), changed, 37),
    }
    for name, (change, fate, row) in cases.items():
        yield BadFolder(f"DALI's index: {name}", fate, row, _changed(IDX, change), run=False)


def _rewritten(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    """Our index with other numbers in it."""

    def make(folder: Path) -> None:
        index = _index(folder)
        arrays = {name: array.copy() for name, array in index.arrays.items()}
        change(arrays)
        _changed(NPZ, lambda data: format_index(replace(index, arrays=arrays)))(folder)

    return make


def _indexes() -> Iterator[BadFolder]:
    named = r"shard-000001\.npz: "
    contents: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda data: b"",
        "garbage": lambda data: b"\xff\xfe" * 99,
        "cut": lambda data: data[: len(data) // 2],
        "one byte": lambda data: data[:900] + bytes([data[900] ^ 1]) + data[901:],
        "a pickle": lambda data: b"\x80\x04\x95" + data[3:],
    }
    for name, change in contents.items():
        yield BadFolder(f"our index: {name}", named, 38, _changed(NPZ, change))
    numbers: dict[str, tuple[Callable[[dict[str, np.ndarray]], object], int]] = {
        "labels swapped": (lambda a: a.__setitem__("label", a["label"][::-1].copy()), 37),
        "shifted": (lambda a: a.__setitem__("offset", np.roll(a["offset"], 1)), 37),
        "negative offset": (lambda a: a["offset"].__setitem__(0, -512), 39),
        "negative size": (lambda a: a["size"].__setitem__(0, -1), 39),
        "offset beyond": (lambda a: a["offset"].__setitem__(-1, 2**40), 39),
        "size of 1e11": (lambda a: a["size"].__setitem__(0, 10**11), 39),
        "size that overflows": (lambda a: a["size"].__setitem__(0, 2**63 - 1), 39),
        "label beyond": (lambda a: a["label"].__setitem__(0, 1000), 41),
        "a key twice": (lambda a: a["key"].__setitem__(1, a["key"][0]), 42),
        "a key that leads out": (lambda a: a["key"].__setitem__(0, b"../x"), 44),
    }
    for name, (change, row) in numbers.items():
        yield BadFolder(f"our index: {name}", named, row, _rewritten(change))


def _manifests() -> Iterator[BadFolder]:
    def edited(change: Callable[[dict], object]) -> Callable[[bytes], bytes]:
        def text(data: bytes) -> bytes:
            body = json.loads(data)
            change(body)
            return json.dumps(body, sort_keys=True, indent=1).encode() + b"\n"

        return text

    cases: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda data: b"",
        "cut": lambda data: data[:-99],
        "a name twice": lambda data: data.replace(b'"samples"', b'"samples": 1, "samples"', 1),
        "nested deep": lambda data: b"[" * 1_000_000,
        "another format": edited(lambda body: body.update(format="others")),
        "another version": edited(lambda body: body.update(version=99)),
        "a negative count": edited(lambda body: body["shards"][0].update(samples=-1)),
        "a count of NaN": lambda data: data.replace(b'"samples": ', b'"samples": NaN', 1),
        "a path that leads out": edited(lambda body: body["shards"][0].update(name="../../x")),
        "a file that leads out": edited(lambda body: body["files"].update({"../x": "0" * 64})),
        "no shards": edited(lambda body: body.update(shards=[])),
        "a class renamed": edited(lambda body: body["classes"].__setitem__(0, "other")),
        "one byte": lambda data: data[:400] + bytes([data[400] ^ 1]) + data[401:],
        "not ASCII": lambda data: data.replace(b"maskwright", "maskwr\u00efght".encode()),
        "a list": lambda data: b"[1, 2]",
    }
    for name, change in cases.items():
        fate = r"manifest\.json: not a usable manifest"
        yield BadFolder(f"manifest: {name}", fate, 62, _changed("manifest.json", change))
    missing = r"no manifest\.json: its conversion was not finished"
    yield BadFolder("manifest missing", missing, 62, lambda folder: (folder / "manifest.json").unlink())


def _forged() -> Iterator[BadFolder]:
    """Other members, and all hashes made again, so that only what the tar says can tell."""
    named = r"shard-000001\.tar:"

    def with_members(change: Callable[[Members], Members]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            with tarfile.open(folder / TAR) as tar:
                members = [(member.name, tar.extractfile(member).read()) for member in tar]
            (folder / TAR).unlink()
            write_tar(folder / TAR, change(members))
            _rehash(folder)

        return make

    def label(text: bytes) -> Callable[[Members], Members]:
        return lambda members: [(members[0][0], text), *members[1:]]

    cases: dict[str, tuple[Callable[[Members], Members], int]] = {
        "no label": (lambda members: members[1:], 40),
        "no image": (lambda members: [members[0], *members[2:]], 40),
        "a sample twice": (lambda members: members[:3] + members, 42),
        "a component twice": (lambda members: members[:1] + members, 42),
        "samples in another order": (lambda members: members[3:6] + members[:3] + members[6:], 43),
        "images, then labels": (lambda members: sorted(members, key=lambda member: member[0][-4:]), 43),
        "leads out": (lambda members: [("../../" + members[0][0], members[0][1]), *members[1:]], 44),
        "no extension": (lambda members: [*members, ("README", b"x")], 45),
        **{
            f"label {text!r}": (label(text), 41)
            for text in (b"cat", b"", b"3.0", b"-1", b"7", b"\xef\xbb\xbf0", b" 0\n")
        },
    }
    for name, (change, row) in cases.items():
        yield BadFolder(f"forged: {name}", named, row, with_members(change), quick=False)


def _rehash(folder: Path) -> None:
    """Let index and manifest promise the tar that lies there now."""
    tar = (folder / TAR).read_bytes()
    index = replace(_index(folder), tar_size=len(tar), tar_sha256=sha256_hex(tar))
    _changed(NPZ, lambda data: format_index(index))(folder)
    manifest = parse_manifest((folder / "manifest.json").read_text(), folder / "manifest.json")
    records = list(manifest.shards)
    digests = {**records[1].sha256, "tar": index.tar_sha256, "npz": sha256_hex((folder / NPZ).read_bytes())}
    records[1] = replace(records[1], bytes=len(tar), sha256=digests)
    text = replace(manifest, shards=tuple(records)).text()
    _changed("manifest.json", lambda data: text.encode())(folder)
