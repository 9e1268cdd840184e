"""What class a sample of somebody else's tar has: a number in its `cls`, or the `label` of its json."""

from __future__ import annotations

import json
import re
from typing import Any

from shards.foreign.tars import ForeignTar, Place
from shards.layout import DataError

_MOST_DIGITS = 6
_MOST_CLASSES = 10**_MOST_DIGITS
_MOST_LABEL, _MOST_JSON = 64, 2**20  # bytes
# An object without another in it and without escapes, and the folder in its (last) `filename`.
_PLAIN_FILENAME = re.compile(rb'\{[^{}\\]*"filename"\s*:\s*"(?:[^"\\]*/)?([^"/\\]+)/[^"/\\]*"[^{}\\]*\}')
_WHITE = b" \t\r\n"

# The files that lie side by side under one key: the key, and their places by extension in lower case.
Sample = tuple[bytes, dict[bytes, Place]]


def label_of(tar: ForeignTar, sample: Sample) -> tuple[int, str]:
    """A sample's class, and where it stands: in `cls`, in `json`, or nowhere (-1).

    Raises DataError naming tar and key for anything but a whole number that stands there once.
    """
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
            _check_once(tar, sample)
            return label, "json"
    return -1, "none"


def labels_of_run(tar: ForeignTar, places: dict[bytes, list[Place]]) -> list[int] | None:
    """The classes of samples with the same files; None where they must be looked at one by one."""
    if b"cls" not in places:
        return None if b"json" in places else [-1] * len(next(iter(places.values())))
    if not all(0 < size <= _MOST_DIGITS for _, _, size, _ in places[b"cls"]):
        return None
    texts = [head if len(head) == size else tar.read(offset, size) for _, offset, size, head in places[b"cls"]]
    return list(map(int, texts)) if b"".join(texts).isdigit() else None


def _check_once(tar: ForeignTar, sample: Sample) -> None:
    """JSON allows a name twice in an object, and programs disagree which counts."""
    content = _content(tar, sample, b"json", _MOST_JSON)
    if content.count(b"label") == 1 and b"\\u" not in content:
        return  # nearly always

    def names_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if sum(name == "label" for name, _ in pairs) > 1:
            raise _no_class(tar, sample, "json's label is there twice")
        return dict(pairs)

    json.loads(content, object_pairs_hook=names_once)


def class_name_of(tar: ForeignTar, sample: Sample) -> str:
    """The folder in json's `filename`, as in n01440764/n01440764_18.JPEG; empty where there is none.

    A json that cannot be read does no harm where the label stands in `cls`.
    """
    if plain := _PLAIN_FILENAME.fullmatch(sample[1][b"json"][3]):
        return plain[1].decode("utf-8", "replace")  # ten times faster, and the same
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
        raise fault(tar, sample[0], f"json cannot be read: {str(error)[:100]}") from error
    if not isinstance(told, dict):
        raise fault(tar, sample[0], f"json is {content[:40]!r}, an object is needed")
    return told


def _content(tar: ForeignTar, sample: Sample, extension: bytes, most: int) -> bytes:
    key, parts = sample
    _, offset, size, head = parts[extension]
    if size > most:
        raise fault(tar, key, f"{shown(extension)} has {size:,} bytes, at most {most:,} are read")
    return head if len(head) == size else tar.read(offset, size)


def _no_class(tar: ForeignTar, sample: Sample, found: str) -> DataError:
    return fault(tar, sample[0], f"{found}; a class number from 0 to {_MOST_CLASSES - 1:,} is needed")


def shown(name: bytes) -> str:
    """A name of a tar for messages."""
    return name.decode("utf-8", "backslashreplace")


def fault(tar: ForeignTar, key: bytes, problem: str, remedy: str = "repack it") -> DataError:
    """The error that names tar and key."""
    return DataError(f"{tar.path}:{shown(key)}: {problem}; {remedy}")


def check_labels(first: dict[str, str]) -> None:
    """DataError naming two samples whose labels stand in different places (cls, json, none)."""
    if len(first) > 1:
        (one, key), (other, second) = list(first.items())[:2]
        raise DataError(
            f"{key}: label in {one}, {second}: label in {other}; all samples must have theirs in the same place: repack"
        )
