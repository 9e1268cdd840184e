"""The samples of a tar in WebDataset's layout that somebody else made, as our index of it.

The files of a sample lie side by side and share their name up to the first dot: KEY.jpg and KEY.cls, or KEY.json with
a `label`. What cannot be read in exactly one way (a key twice, a sample in two places, two images, no image, a label
that is no number) is refused; images that cannot be trained on are left out and listed. Hidden files are passed over.
"""

from __future__ import annotations

import json
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from shards.foreign.tars import ForeignTar, Place
from shards.image_headers import read_image_header
from shards.index import ForeignIndex
from shards.layout import DataError, Rejection, escape_key
from shards.making.screening import Rejected

_EXPECTED = "expected are one image (jpg, jpeg, png or webp) and a label, if there are any, in cls or in json's `label`"
_LOOKED_AT = 5  # samples that tell a layout
_MOST_DIGITS = 6
_MOST_CLASSES = 10**_MOST_DIGITS
_IMAGES = (b"jpg", b"jpeg", b"png", b"webp")
_MOST_PARTS = 32  # files of a sample
_MOST_LABEL, _MOST_JSON = 64, 2**20  # bytes
_WHITE = b" \t\r\n"
_NAMES = ("start", "offset", "size", "label", "height", "width", "key", "extension")
_NOTHING_TO_ESCAPE = (string.ascii_letters + string.digits + "_").encode()


# The files that lie side by side under one key: the key, and their places by extension in lower case.
Sample = tuple[bytes, dict[bytes, Place]]


@dataclass
class TarContents:
    """What was found in one tar."""

    index: ForeignIndex
    components: Counter[str]  # samples by their extensions, such as "cls jpg"
    label_keys: dict[str, str]  # the first key by where its label stands: cls, json, none
    class_names: dict[int, str]  # by label, where there is json; empty where its `filename` has no folder


@dataclass
class _Layout:
    """Samples with the same extensions in the same order."""

    image: bytes  # extension
    number: int = 0


@dataclass
class _Columns:
    """The index while it grows."""

    rows: list[tuple[int, int, int, int, int, int, bytes, str]] = field(default_factory=list)  # as `_NAMES`
    rejected: list[Rejection] = field(default_factory=list)
    layouts: dict[tuple[bytes, ...], _Layout] = field(default_factory=dict)  # by all extensions of a sample
    label_keys: dict[str, bytes] = field(default_factory=dict)
    class_names: dict[int, str] = field(default_factory=dict)


def read_samples(tar: ForeignTar, begin: int = 0, first: int | None = None) -> Iterator[Sample]:
    """The samples of a tar from byte `begin` on; with `first`, as many as lie complete in so many files, and one more.

    Raises DataError naming tar and key as `ForeignTar.stretches` does, and for files without extension, for an
    extension twice, and for a key that comes again.
    """
    seen: dict[bytes, int] = {}
    current, parts = None, {}
    stretches = tar.stretches(begin) if first is None else [next(tar.stretches(begin, first))]
    for names, places in stretches:
        for (key, _, extension), place in zip(_split(names), places, strict=True):
            if key != current:
                if not key:
                    continue  # a hidden file
                if parts:
                    yield current, parts
                if key in seen:
                    raise _again(tar, key, seen[key], place[0])
                current, parts, seen[key] = key, {}, place[0]
            if not extension:
                raise _fault(tar, key, "a file without extension belongs to no sample", "repack the tar without it")
            extension = extension.lower()
            if extension in parts:
                raise _twice(tar, key, extension, parts[extension][1], place[1])
            parts[extension] = place
    if parts:
        yield current, parts


def index_tar(path: Path) -> TarContents:
    """Index a tar. Reads headers, labels and the beginnings of images.

    Raises DataError, naming tar and key, for everything that cannot be read in exactly one way, and where no image
    is left.
    """
    columns = _Columns()
    with ForeignTar(path) as tar:
        for sample in read_samples(tar):
            _add(columns, tar, sample)
        if not columns.layouts:
            raise tar.fault("no samples in it", "take it out of the folder")
        if not columns.rows:
            first = columns.rejected[0]
            raise tar.fault(
                f"not one usable image ({len(columns.rejected):,} rejected, first {first.path}: {first.reason}: "
                f"{first.detail})"
            )
        index = ForeignIndex(tar.size, tar.headers_sha256, _arrays(columns), tuple(columns.rejected))
    components: Counter[str] = Counter()
    for names, layout in columns.layouts.items():
        components[_listed(names)] += layout.number
    label_keys = {stands_in: _shown(key) for stands_in, key in columns.label_keys.items()}
    return TarContents(index, components, label_keys, columns.class_names)


def layout_of(path: Path) -> list[str]:
    """Components of a tar's first samples, such as `["cls jpg", ...]`; DataError where one has not exactly one image.

    Tells a wrong layout at once, however long the tar is.
    """
    with ForeignTar(path) as tar:
        samples = list(islice(read_samples(tar, first=(_LOOKED_AT + 1) * _MOST_PARTS), _LOOKED_AT))
        if not samples:
            raise tar.fault("no samples in it", f"give a folder of WebDataset shards; {_EXPECTED}")
        for sample in samples:
            _image_of(tar, sample)
        return [_listed(parts) for _, parts in samples]


def holds_sample(tar: ForeignTar, start: int, key: bytes, offset: int, size: int) -> bool:
    """Whether the sample with this (escaped) key begins at byte `start` and has its image at `offset`."""
    try:
        found, parts = next(read_samples(tar, start, first=2 * _MOST_PARTS))
        place = parts[_image_of(tar, (found, parts))]
    except (DataError, StopIteration):
        return False
    return (_escaped([found])[0], *place[1:3]) == (key, offset, size)


def _shown(name: bytes) -> str:
    """A name of a tar for messages."""
    return name.decode("utf-8", "backslashreplace")


def _fault(tar: ForeignTar, key: bytes, problem: str, remedy: str = "repack it") -> DataError:
    """The error that names tar and key."""
    return DataError(f"{tar.path}:{_shown(key)}: {problem}; {remedy}")


def check_labels(first: dict[str, str]) -> None:
    """DataError naming two samples whose labels stand in different places (cls, json, none)."""
    if len(first) > 1:
        (one, key), (other, second) = list(first.items())[:2]
        raise DataError(
            f"{key}: label in {one}, {second}: label in {other}; all samples must have theirs in the same place: repack"
        )


def _split(names: Sequence[bytes]) -> list[tuple[bytes, bytes, bytes]]:
    """(key, dot, extension) of names; the key is empty for hidden files, such as macOS adds."""
    if b"/" not in b"".join(names):
        return [name.partition(b".") for name in names]
    found = []
    for name in names:
        folder, slash, base = name.rpartition(b"/")
        stem, dot, extension = base.partition(b".")
        found.append((folder + slash + stem if stem else b"", dot, extension))
    return found


def _add(columns: _Columns, tar: ForeignTar, sample: Sample) -> None:
    key, parts = sample
    names = tuple(parts)
    layout = columns.layouts.get(names)
    if layout is None:
        layout = columns.layouts[names] = _Layout(_image_of(tar, sample))
    layout.number += 1
    label, stands_in = _label(tar, sample)
    if stands_in not in columns.label_keys:
        columns.label_keys[stands_in] = key
        check_labels({kind: f"{tar.path}:{_shown(first)}" for kind, first in columns.label_keys.items()})
    if b"json" in parts and label not in columns.class_names:
        columns.class_names[label] = _class_name(tar, sample)
    _, offset, size, head = parts[layout.image]
    try:
        kind, height, width = read_image_header(head, size, lambda begin, length: tar.read(offset + begin, length))
    except Rejected as rejected:
        path = (key + b"." + layout.image).decode("utf-8", "surrogateescape")
        columns.rejected.append(Rejection(path, rejected.reason, rejected.detail, ""))
        return
    start = next(iter(parts.values()))[0]
    columns.rows.append((start, offset, size, label, height, width, key, kind))


def _image_of(tar: ForeignTar, sample: Sample) -> bytes:
    """Extension of a sample's one image."""
    key, parts = sample
    images = [extension for extension in _IMAGES if extension in parts]
    if len(images) != 1:
        raise _fault(tar, key, f"has {len(images) or 'no'} images, found are {_listed(parts)[:200]}; {_EXPECTED}")
    if len(parts) > _MOST_PARTS:
        raise _fault(tar, key, f"has {len(parts)} files, at most {_MOST_PARTS} are read")
    return images[0]


def _label(tar: ForeignTar, sample: Sample) -> tuple[int, str]:
    """A sample's class, and where it stands: in `cls`, in `json`, or nowhere (-1)."""
    _, parts = sample
    if b"cls" in parts:
        text = _content(tar, sample, b"cls", _MOST_LABEL)
        digits = text.strip(_WHITE)
        if not digits.isdigit() or len(digits) > _MOST_DIGITS:
            raise _no_class(tar, sample, f"cls is {text[:40]!r}")
        return int(digits), "cls"
    if b"json" in parts:
        label = _description(tar, sample).get("label")
        if label is not None:
            if type(label) is not int or not 0 <= label < _MOST_CLASSES:
                raise _no_class(tar, sample, f"json's label is {str(label)[:40]!r}")
            return label, "json"
    return -1, "none"


def _class_name(tar: ForeignTar, sample: Sample) -> str:
    """The folder in json's `filename`, as in n01440764/n01440764_18.JPEG; empty where there is none.

    A json that cannot be read does no harm where the label stands in `cls`.
    """
    try:
        filename = _description(tar, sample).get("filename")
    except DataError:
        return ""
    return filename.rpartition("/")[0].rpartition("/")[2] if isinstance(filename, str) else ""


def _description(tar: ForeignTar, sample: Sample) -> dict[str, Any]:
    content = _content(tar, sample, b"json", _MOST_JSON)
    try:
        told = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _fault(tar, sample[0], f"json cannot be read: {str(error)[:100]}") from error
    if not isinstance(told, dict):
        raise _fault(tar, sample[0], f"json is {content[:40]!r}, an object is needed")
    return told


def _content(tar: ForeignTar, sample: Sample, extension: bytes, most: int) -> bytes:
    key, parts = sample
    _, offset, size, head = parts[extension]
    if size > most:
        raise _fault(tar, key, f"{_shown(extension)} has {size:,} bytes, at most {most:,} are read")
    return head if len(head) == size else tar.read(offset, size)


def _no_class(tar: ForeignTar, sample: Sample, found: str) -> DataError:
    return _fault(tar, sample[0], f"{found}; a class number from 0 to {_MOST_CLASSES - 1:,} is needed")


def _twice(tar: ForeignTar, key: bytes, extension: bytes, one: int, other: int) -> DataError:
    where = f"at bytes {one:,} and {other:,}"
    return _fault(tar, key, f"two {_shown(extension)}, {where}: a duplicate, or two samples of one key")


def _again(tar: ForeignTar, key: bytes, one: int, other: int) -> DataError:
    where = f"at bytes {one:,} and {other:,}"
    return _fault(tar, key, f"the same key {where}: two samples, or one whose files are not side by side")


def _listed(extensions: Sequence[bytes] | dict[bytes, Place]) -> str:
    return _shown(b" ".join(sorted(extensions)))


def _arrays(columns: _Columns) -> dict[str, np.ndarray]:
    arrays = dict(zip(_NAMES, zip(*columns.rows, strict=True), strict=True))
    arrays["key"] = _escaped(arrays["key"])
    return {name: np.array(values, ForeignIndex.ARRAYS[name]) for name, values in arrays.items()}


def _escaped(keys: Sequence[bytes]) -> Sequence[bytes]:
    """`escape_key` of every key; most sets have nothing to escape."""
    if not b"".join(keys).translate(None, _NOTHING_TO_ESCAPE):
        return keys
    return [escape_key(key.decode("utf-8", "surrogateescape")).encode("ascii") for key in keys]
