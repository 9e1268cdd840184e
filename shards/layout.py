"""What a folder of shards looks like: file names, sample keys, the manifest, and the errors about all of them.

    OUT/shard-000000.tar    samples in a row: KEY.cls, KEY.jpg|png|webp, KEY.json (USTAR, times and owners zero)
    OUT/shard-000000.npz    our index: offsets, sizes, labels, pixels, keys, checksums (shards/index.py)
    OUT/shard-000000.idx    the same for DALI's own WebDataset reader (shards/dali_index.py)
    OUT/plan.json           written first: what is being made here, so that a rerun knows its own
    OUT/_info.json          what timm's WebDataset reader needs
    OUT/quarantine.jsonl    the images that were left out: path, reason, detail, sha256
    OUT/manifest.json       written last: a folder without it is not complete

Numbers run with the plan; a shard whose images were all rejected does not exist, so numbers may have gaps.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

FORMAT = "maskwright-shards"
VERSION = 1
MANIFEST = "manifest.json"
TIMM_INFO = "_info.json"
QUARANTINE = "quarantine.jsonl"
PLAN = "plan.json"  # written first: says which conversion the folder belongs to
OTHER_FILES = (PLAN, QUARANTINE, TIMM_INFO)  # in the manifest, beside the shards
IMAGE_EXTENSIONS = ("jpg", "png", "webp")
SHARD_SUFFIXES = ("tar", "npz", "idx")
TAR_BLOCK = 512  # bytes: tar headers and data start at multiples of it

MAX_KEY = 95  # bytes: USTAR allows names of 100, and `.json` is the longest ending
_REMAKE = "delete it and run tools/make_shards.py again"
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_")
_USUAL_KEY = re.compile(r"\w+(-\w+)*", re.ASCII)  # nothing to escape: a short cut for a million names
_SHARD_NAME = re.compile(r"shard-[0-9]{6,9}", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


class DataError(ValueError):
    """Data that cannot be used as they are; the message names the file, the key where there is one, and a remedy."""


class MissingData(DataError, FileNotFoundError):
    """A folder or file that should be there is not."""


class Rejection(NamedTuple):
    """An image left out. `sha256` is empty where the file could not be read."""

    path: str  # relative to the source folder
    reason: str  # one word, for counting
    detail: str
    sha256: str


def shard_name(number: int) -> str:
    """Stem of the files of a shard."""
    return f"shard-{number:06d}"


def padded(size: int) -> int:
    """`size` bytes rounded up to whole tar blocks."""
    return -(-size // TAR_BLOCK) * TAR_BLOCK


def escape_key(name: str) -> str:
    """`name` in the characters [A-Za-z0-9_-]; `unescape_key` undoes it.

    Any other byte becomes `--hh` (two hex digits). A dash stays a dash unless a dash or an escape follows, so usual
    names do not change: `my-cat_1` is kept, `a b` becomes `a--20b`.
    """
    if _USUAL_KEY.fullmatch(name):
        return name
    raw = name.encode("utf-8", "surrogateescape")
    out = []
    for position, byte in enumerate(raw):
        lone_dash = byte == ord("-") and _PLAIN.issuperset(raw[position + 1 : position + 2])
        out.append(chr(byte) if byte in _PLAIN or lone_dash else f"--{byte:02x}")
    return "".join(out)


def unescape_key(key: str) -> str:
    """The name that `escape_key` was given."""
    raw = re.sub(rb"--([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), key.encode("ascii"))
    return raw.decode("utf-8", "surrogateescape")


def canonical_json(value: object) -> str:
    """JSON text that depends on the value only: sorted names, ASCII, one line per entry."""
    return json.dumps(value, sort_keys=True, ensure_ascii=True, indent=1, allow_nan=False) + "\n"


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """sha256 as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def json_sha256(value: object) -> str:
    """sha256 of a JSON value, whatever the order of its names (compact text: an index of a million files is hashed)."""
    return sha256_hex(json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii"))


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One shard as the manifest promises it."""

    name: str  # stem of its three files
    samples: int
    bytes: int  # of the tar
    sha256: Mapping[str, str]  # of each file, by suffix: tar, npz, idx

    def file(self, suffix: str) -> str:
        """Name of one of the three files."""
        return f"{self.name}.{suffix}"

    def check(self) -> None:
        """Raise ValueError unless every field is possible."""
        _need(isinstance(self.name, str) and _SHARD_NAME.fullmatch(self.name), f"shard name {self.name!r}")
        _need(_is_count(self.samples) and self.samples > 0, f"{self.name}: samples={self.samples!r}")
        _need(_is_count(self.bytes) and self.bytes > 0, f"{self.name}: bytes={self.bytes!r}")
        _need(
            isinstance(self.sha256, dict)
            and set(self.sha256) == set(SHARD_SUFFIXES)
            and all(_is_sha256(value) for value in self.sha256.values()),
            f"{self.name}: sha256={self.sha256!r}",
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The whole folder: what is in it, what it was made from, and the hash of every file."""

    split: str
    samples: int
    classes: tuple[str, ...]  # names by class index, sorted bytewise
    shards: tuple[ShardRecord, ...]
    quarantined: Mapping[str, int]  # images left out, by reason
    source: Mapping[str, Any]  # images, bytes, listing_sha256
    plan: Mapping[str, Any]  # sha256, and the options that shaped the shards
    files: Mapping[str, str]  # sha256 of the other files, by name

    def text(self) -> str:
        """The file's exact text; `checksum` covers all of the rest."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "split": self.split,
            "samples": self.samples,
            "classes": list(self.classes),
            "shards": [dict(vars(shard)) for shard in self.shards],
            "quarantined": dict(self.quarantined),
            "source": dict(self.source),
            "plan": dict(self.plan),
            "files": dict(self.files),
        }
        return canonical_json({**body, "checksum": json_sha256(body)})

    def check(self) -> None:
        """Raise ValueError unless the fields are possible and agree with each other."""
        _need(isinstance(self.split, str), f"split={self.split!r}")
        _need(all(isinstance(name, str) for name in self.classes), "classes: names are needed")
        _need(len(set(self.classes)) == len(self.classes), "classes: a name twice")
        for shard in self.shards:
            shard.check()
        names = [shard.name for shard in self.shards]
        _need(len(set(names)) == len(names), "shards: a name twice")
        total = sum(shard.samples for shard in self.shards)
        _need(_is_count(self.samples) and self.samples == total, f"samples={self.samples!r}, the shards hold {total}")
        _need(all(map(_is_count, self.quarantined.values())), f"quarantined={self.quarantined!r}")
        images = self.source.get("images")
        promised = self.samples + sum(self.quarantined.values())
        _need(images == promised, f"source.images={images!r}, written and quarantined make {promised}")
        _need(_is_sha256(self.plan.get("sha256")), "plan.sha256: 64 hex digits are needed")
        for name, digest in self.files.items():
            _need(name in OTHER_FILES and _is_sha256(digest), f"files: {name!r}: {digest!r}")


def parse_manifest(text: str, file: Path) -> Manifest:
    """Read a manifest strictly.

    Raises DataError, naming `file`, for anything but the exact text that `Manifest.text` writes.
    """
    try:
        body = json.loads(text, object_pairs_hook=_without_repeats, parse_constant=_refuse_constant)
        _need(isinstance(body, dict), "an object is needed")
        _need(body.get("format") == FORMAT, f"format={body.get('format')!r}, not {FORMAT!r}")
        _need(body.get("version") == VERSION, f"version={body.get('version')!r}, this program reads {VERSION}")
        manifest = _manifest_from(body)
        _need(manifest.text() == text, "the text does not match its own checksum: it was edited or damaged")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: not a usable manifest: {error}; {_REMAKE}") from error
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`; MissingData says whether the folder, or only its manifest, is not there."""
    if not folder.is_dir():
        raise MissingData(f"{folder}: no such folder; make it with tools/make_shards.py SRC {folder}")
    file = folder / MANIFEST
    if not file.is_file():
        state = "its conversion was not finished" if (folder / PLAN).exists() else "it holds no finished shards"
        raise MissingData(f"{folder}: no {MANIFEST}: {state}; run tools/make_shards.py SRC {folder}")
    try:
        text = file.read_bytes().decode("ascii")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not a usable manifest: {error}; {_REMAKE}") from error
    return parse_manifest(text, file)


def _manifest_from(body: dict[str, Any]) -> Manifest:
    fields = {name: body[name] for name in Manifest.__dataclass_fields__ if name in body}
    _need(len(fields) == len(Manifest.__dataclass_fields__), f"fields missing: found {sorted(body)}")
    for name in ("classes", "shards"):
        _need(isinstance(fields[name], list), f"{name}: a list is needed")
    for name in ("quarantined", "source", "plan", "files"):
        _need(isinstance(fields[name], dict), f"{name}: an object is needed")
    fields["classes"] = tuple(fields["classes"])
    fields["shards"] = tuple(ShardRecord(**shard) for shard in fields["shards"])
    manifest = Manifest(**fields)
    manifest.check()
    return manifest


def _need(condition: object, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    _need(len(result) == len(pairs), "a name twice in one object")
    return result


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number")
