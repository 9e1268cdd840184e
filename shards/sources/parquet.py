"""Hugging Face's image sets as parquet files, for example `data/train-00000-of-00294.parquet` (extra `parquet`).

A row has an `image` (its bytes and the name it had) and perhaps a `label`; class names stand in the file's metadata.
Rows are read a row group at a time, so an order other than the file's own would read everything again for each image:
such a source is converted in its own order (training shuffles all the same).
"""

from __future__ import annotations

import functools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shards.layout import DataError, MissingData
from shards.making.screening import Rejected
from shards.sources.listing import Entry, Listing, Place, numbered_classes

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_NO_LABEL = -1
_PART = re.compile(r"-[0-9]+-of-([0-9]+)", re.ASCII)  # in a file's name
_INTEGER = re.compile(r"u?int(8|16|32|64)", re.ASCII)


def list_parquet(folder: Path, *, split: str = "train", progress: Callable[[int, int], None] | None = None) -> Listing:
    """The rows of the files `SPLIT-*.parquet` below `folder`. `progress(done, all)` counts files.

    Raises DataError saying which columns or labels were found, MissingData where the split is not there.
    """
    files = sorted(folder.rglob(f"{split}-*.parquet"))
    notes = _check_files(folder, split, files)
    classes: tuple[str, ...] | None = None
    entries: list[Entry] = []
    for done, file in enumerate(files, start=1):
        names, rows, without = _rows(folder, file)
        if classes not in (None, names):
            raise DataError(f"source={folder}: {file.name} has other class names than {files[0].name}; keep one set")
        classes = names
        entries += rows
        notes += [note for note in without if note not in notes]
        if progress:
            progress(done, len(files))
    if not entries:
        raise DataError(f"source={folder}: no rows in {len(files):,} files {split}-*.parquet; download them again")
    classes = _classes(folder, classes or (), [entry.label for entry in entries])
    return Listing(folder, classes, tuple(_told_apart(entries)), notes=tuple(notes), shuffled=False)


def _check_files(folder: Path, split: str, files: Sequence[Path]) -> list[str]:
    """Raise unless the files are those of one set; returns a note where some are missing."""
    if not files:
        found = ", ".join(sorted({path.name.partition("-")[0] for path in folder.rglob("*.parquet")})) or "none"
        raise MissingData(
            f"source={folder}: no files {split}-*.parquet (splits found: {found}); choose one by --source-split"
        )
    places = sorted({str(file.parent) for file in files})
    if len(places) > 1:
        raise DataError(
            f"source={folder}: {split}-*.parquet in {len(places)} folders ({places[0]}, {places[1]}, ...): several "
            "sets; give one of these folders"
        )
    promised = sorted({int(match[1]) for file in files if (match := _PART.search(file.stem))})
    if len(promised) > 1:
        raise DataError(
            f"source={folder}: files of a set of {promised[0]} and of one of {promised[1]} ({files[0].name}, ...), two "
            "downloads in one folder; keep one"
        )
    if promised and promised[0] != len(files):
        return [f"{promised[0]:,} files {split}-*.parquet are promised by their names, {len(files):,} are here"]
    return []


def _rows(folder: Path, file: Path) -> tuple[tuple[str, ...], list[Entry], list[str]]:
    """Class names, entries and notes of one file; only names and labels are read, not the images."""
    opened = _open(file)
    columns = sorted(opened.schema_arrow.names)
    leaves = {opened.schema.column(i).path for i in range(len(opened.schema))}
    if "image.bytes" not in leaves:
        raise DataError(f"source={file}: columns {columns}; expected image (with bytes and path) and label")
    count, place = opened.metadata.num_rows, str(file.relative_to(folder))
    paths = opened.read(columns=["image.path"]).column("image").to_pylist() if "image.path" in leaves else [{}] * count
    labels = _labels(file, opened) if "label" in columns else [_NO_LABEL] * count
    notes = [] if "label" in columns else [f"no column label, so no image has one (columns: {', '.join(columns)})"]
    names = _class_names(file, opened)
    size = sum(_image_bytes(opened, group) for group in range(opened.num_row_groups)) // max(count, 1)
    entries = []
    for row, (path, label) in enumerate(zip(paths, labels, strict=True)):
        stem = Path((path or {}).get("path") or f"{file.stem}-{row:06d}.jpg").name
        group = f"{names[label] if label < len(names) else label}/" if label >= 0 else ""
        entries.append(Entry(group.replace(", ", "_") + stem, label, size, None, Place("parquet", place, row)))
    return names, entries, notes


def _labels(file: Path, opened: pyarrow.parquet.ParquetFile) -> list[int]:
    """The column label, with -1 for none; DataError unless it holds class numbers."""
    kind = str(opened.schema_arrow.field("label").type)
    if not _INTEGER.fullmatch(kind):
        raise DataError(f"source={file}: the column label is of the kind {kind}; class numbers 0, 1, 2, ... are needed")
    labels = [_NO_LABEL if label is None else label for label in opened.read(columns=["label"])["label"].to_pylist()]
    if min(labels, default=0) < _NO_LABEL:
        raise DataError(f"source={file}: the label {min(labels)}; class numbers 0, 1, 2, ... (or -1, none) are needed")
    return labels


def _classes(folder: Path, names: tuple[str, ...], labels: Sequence[int]) -> tuple[str, ...]:
    """Names of all classes, numbers where they have none; DataError where names and labels do not fit."""
    unlabelled, top = labels.count(_NO_LABEL), max(labels)
    if unlabelled not in (0, len(labels)):
        raise DataError(f"source={folder}: {unlabelled:,} of {len(labels):,} rows have no label; give all or none one")
    if len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise DataError(f"source={folder}: {len(names):,} class names, {twice!r} more than once; make them different")
    if names and top >= len(names):
        raise DataError(f"source={folder}: the label {top:,}, and only {len(names):,} class names; give a name to each")
    return names or numbered_classes(f"source={folder}", top, len(labels))


def _told_apart(entries: Sequence[Entry]) -> Iterator[Entry]:
    """Rows whose images have the same name (image.jpg everywhere) are called by their place instead."""
    shared = Counter(entry.path for entry in entries)
    for entry in entries:
        if shared[entry.path] == 1:
            yield entry
        else:
            group, slash, name = entry.path.rpartition("/")
            unique = f"{Path(entry.place.file).stem}-{entry.place.position:06d}-{name}"
            yield entry._replace(path=group + slash + unique)


def _open(file: Path) -> pyarrow.parquet.ParquetFile:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"source={file}: pyarrow is not installed; pip install 'maskwright[parquet]'") from error
    try:
        return pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"source={file}: not a readable parquet file: {error}; download it again") from error


def _image_bytes(opened: pyarrow.parquet.ParquetFile, group: int) -> int:
    about = opened.metadata.row_group(group)
    columns = (about.column(i) for i in range(about.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == "image.bytes")


def _class_names(file: Path, opened: pyarrow.parquet.ParquetFile) -> tuple[str, ...]:
    try:
        about = json.loads((opened.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        return tuple(map(str, about.get("info", {}).get("features", {}).get("label", {}).get("names", ())))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"source={file}: its description of columns cannot be read: {error}; write it again") from error


def read_row(file: Path, row: int) -> bytes:
    """The encoded image of one row; Rejected where the row has none, DataError where the file cannot be read."""
    opened, starts = _reader(file)
    group = max(g for g, start in enumerate(starts) if start <= row)
    try:
        cell = _row_group(file, group)[row - starts[group]].as_py()
    except (OSError, IndexError, ValueError) as error:  # pyarrow's own errors are of these kinds
        reason = " ".join(str(error).split())
        raise DataError(f"source={file}: row {row:,} cannot be read: {reason}; download the file again") from error
    data = (cell or {}).get("bytes")
    if data is None:
        raise Rejected("no-bytes", f"row {row:,} of {file.name} holds no image bytes, only a path")
    return data


@functools.lru_cache(maxsize=2)
def _reader(file: Path) -> tuple[pyarrow.parquet.ParquetFile, list[int]]:
    """A file and the first row of each of its groups."""
    opened, starts, start = _open(file), [], 0
    for group in range(opened.num_row_groups):
        starts.append(start)
        start += opened.metadata.row_group(group).num_rows
    return opened, starts


@functools.lru_cache(maxsize=2)
def _row_group(file: Path, group: int) -> pyarrow.ChunkedArray:
    return _reader(file)[0].read_row_group(group, columns=["image"]).column("image")
