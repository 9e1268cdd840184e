"""A plain list of images: one `PATH LABEL` per line, separated by a tab, a comma or blanks before the last word.

Labels are class numbers (all of them) or class names; without a second column the images have no label. Paths are
relative to a root, by default the list's own folder, and may not leave it.
"""

from __future__ import annotations

import os
from pathlib import Path

from shards.layout import DataError, MissingData
from shards.sources.listing import Entry, Listing

LIST_SUFFIXES = (".txt", ".tsv", ".csv", ".lst")
UNLABELLED = -1


def list_paths(file: Path, *, root: Path | None = None) -> Listing:
    """The images that `file` names. DataError naming the line for one that cannot be read, or for mixed labels."""
    if not file.is_file():
        raise MissingData(f"source={file}: no such file")
    root = root or file.parent
    rows = [_row(file, number, line) for number, line in enumerate(_lines(file), start=1) if line.strip()]
    if not rows:
        raise DataError(f"source={file}: an empty list; expected lines `PATH LABEL`")
    _check_rows(file, rows)
    classes, number = _classes(file, [label for _, label in rows])
    entries = []
    for path, label in sorted(rows, key=lambda row: os.fsencode(row[0])):
        entries.append(_entry(root, path, UNLABELLED if label is None else number[label]))
    return Listing(root, classes, tuple(entries))


def _lines(file: Path) -> list[str]:
    return file.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff").splitlines()


def _row(file: Path, number: int, line: str) -> tuple[str, str | None]:
    for separator in ("\t", ",", None):
        words = [word.strip() for word in line.rsplit(separator, 1)]
        if len(words) == 2 and all(words):
            break
    path, label = words if len(words) == 2 else (line.strip(), None)
    parts = path.split("/")
    if path.startswith("/") or ".." in parts or "\0" in path:
        raise DataError(f"source={file}: line {number}: {path[:80]!r} leaves the root; write paths relative to --root")
    return os.path.normpath(path), label


def _check_rows(file: Path, rows: list[tuple[str, str | None]]) -> None:
    unlabelled = sum(label is None for _, label in rows)
    if unlabelled not in (0, len(rows)):
        raise DataError(f"source={file}: {unlabelled:,} of {len(rows):,} lines have no label; give all or none one")
    seen: set[str] = set()
    for path, _ in rows:
        if path in seen:
            raise DataError(f"source={file}: {path!r} is listed twice; keep one line")
        seen.add(path)


def _classes(file: Path, labels: list[str | None]) -> tuple[tuple[str, ...], dict[str | None, int]]:
    """Names by number, and numbers by what stands in the list."""
    if labels[0] is None:
        return (), {}
    if all(label.isascii() and label.isdecimal() for label in labels):
        top = max(map(int, labels))
        if top >= 10 * len(labels) + 1000:
            raise DataError(f"source={file}: class number {top:,} for {len(labels):,} images; number classes from 0")
        return tuple(map(str, range(top + 1))), {label: int(label) for label in labels}
    names = sorted(set(labels), key=os.fsencode)
    return tuple(names), {name: number for number, name in enumerate(names)}


def _entry(root: Path, path: str, label: int) -> Entry:
    try:
        status = os.stat(root / path)
    except OSError as error:
        return Entry(path, label, 0, ("io", error.strerror or str(error)))
    real, boundary = os.path.realpath(root / path), os.path.join(os.path.realpath(root), "")
    if not real.startswith(boundary):
        return Entry(path, label, 0, ("link", "leaves the source folder"))
    if not os.path.isfile(real):
        return Entry(path, label, 0, ("not-a-file", "folder, pipe, socket or device"))
    return Entry(path, label, status.st_size)
