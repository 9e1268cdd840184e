"""A plain list of images: one `PATH LABEL` per line, separated by a tab, a comma or blanks before the last word.

Labels are class numbers (all of them) or class names (none of them a number); without a second column, or with -1,
the images have no label. Paths are relative to a root, by default the list's own folder, and may not leave it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from shards.layout import DataError, MissingData
from shards.sources.listing import Entry, Listing, numbered_classes

LIST_SUFFIXES = (".txt", ".tsv", ".csv", ".lst")
UNLABELLED = -1
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?", re.ASCII)


def list_paths(file: Path, *, root: Path | None = None) -> Listing:
    """The images that `file` names. DataError naming the line for one that cannot be read, or for mixed labels."""
    if not file.is_file():
        raise MissingData(f"source={file}: no such file")
    root = root or file.parent
    lines = {number: line for number, line in enumerate(_lines(file), start=1) if line.strip()}
    if not lines:
        raise DataError(f"source={file}: an empty list; expected lines `PATH LABEL`")
    rows = [_row(file, number, line) for number, line in lines.items()]
    _check_rows(file, rows)
    _check_header(file, root, rows[0][0])
    _check_labels(file, list(lines), rows)
    classes, number = _classes(file, [label for _, label in rows])
    entries = []
    for path, label in sorted(rows, key=lambda row: os.fsencode(row[0])):
        entries.append(_entry(root, path, UNLABELLED if label is None else number[label]))
    return Listing(root, classes, tuple(entries))


def _lines(file: Path) -> list[str]:
    """Lines end in a line feed alone, or after a carriage return: names may hold what Unicode calls a line's end."""
    return file.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff").split("\n")


def _row(file: Path, number: int, line: str) -> tuple[str, str | None]:
    for separator in ("\t", ",", None):
        words = [word.strip() for word in line.rsplit(separator, 1)]
        if len(words) == 2 and all(words):
            break
    path, label = words if len(words) == 2 else (line.strip(), None)
    if path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise DataError(f"source={file}: line {number}: {path[:80]!r} leaves the root; write paths relative to --root")
    return os.path.normpath(path), None if label == str(UNLABELLED) else label


def _check_rows(file: Path, rows: list[tuple[str, str | None]]) -> None:
    unlabelled = sum(label is None for _, label in rows)
    if unlabelled not in (0, len(rows)):
        raise DataError(f"source={file}: {unlabelled:,} of {len(rows):,} lines have no label; give all or none one")
    seen: set[str] = set()
    for path, _ in rows:
        if path in seen:
            raise DataError(f"source={file}: {path!r} is listed twice; keep one line")
        seen.add(path)


def _check_header(file: Path, root: Path, first: str) -> None:
    """A table's header would become an image that is not there, and a class that shifts the numbers of the others."""
    if not os.path.splitext(first)[1] and not os.path.lexists(root / first):
        raise DataError(f"source={file}: begins with {first[:80]!r}, no file in {root}: remove the header line")


def _check_labels(file: Path, lines: Sequence[int], rows: list[tuple[str, str | None]]) -> None:
    """Names are numbered in their bytewise order, 10 before 2: numbers must not be taken for names."""
    numbers = [bool(_NUMBER.fullmatch(label or "")) for _, label in rows]
    usable = [bool(label and label.isascii() and label.isdecimal()) for _, label in rows]
    if not any(numbers) or all(usable):
        return
    line, (_, label) = next((line, row) for line, row, good in zip(lines, rows, usable, strict=True) if not good)
    raise DataError(
        f"source={file}: line {line} has the label {label[:80]!r}, {sum(usable):,} of {len(rows):,} lines have class "
        "numbers 0, 1, 2, ...; give all images a number, or all a name that is none"
    )


def _classes(file: Path, labels: list[str | None]) -> tuple[tuple[str, ...], dict[str | None, int]]:
    """Names by number, and numbers by what stands in the list."""
    if labels[0] is None:
        return (), {}
    if all(label.isascii() and label.isdecimal() for label in labels):
        top = max(map(int, labels))
        return numbered_classes(f"source={file}", top, len(labels)), {label: int(label) for label in labels}
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
