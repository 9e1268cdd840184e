"""Hugging Face's image sets as parquet files, for example `data/train-00000-of-00294.parquet` (extra `parquet`).

A row has an `image` (its bytes and the name it had) and perhaps a `label`; class names stand in the file's metadata.
Rows are read a row group at a time, so an order other than the file's own would read everything again for each image:
such a source is converted in its own order (training shuffles all the same).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from shards.layout import DataError, MissingData
from shards.sources.listing import Entry, Listing, Place

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_NO_LABEL = -1


def list_parquet(folder: Path, *, split: str = "train", progress: Callable[[int, int], None] | None = None) -> Listing:
    """The rows of the files `SPLIT-*.parquet` below `folder`. `progress(done, all)` counts files.

    Raises DataError saying which columns were found, MissingData where the split is not there.
    """
    files = sorted(folder.rglob(f"{split}-*.parquet"))
    if not files:
        found = ", ".join(sorted({path.name.partition("-")[0] for path in folder.rglob("*.parquet")})) or "none"
        raise MissingData(f"source={folder}: no files {split}-*.parquet (splits found: {found}); choose one by --split")
    classes: tuple[str, ...] | None = None
    entries: list[Entry] = []
    for done, file in enumerate(files, start=1):
        names, rows = _rows(folder, file)
        if classes not in (None, names):
            raise DataError(f"source={folder}: {file.name} has other class names than {files[0].name}; keep one set")
        classes = names
        entries += rows
        if progress:
            progress(done, len(files))
    top = max((entry.label for entry in entries), default=_NO_LABEL)
    if top >= len(classes or ()):
        classes = tuple(map(str, range(top + 1)))  # numbers without names
    return Listing(folder, classes or (), tuple(entries), shuffled=False)


def _rows(folder: Path, file: Path) -> tuple[tuple[str, ...], list[Entry]]:
    """Class names and entries of one file; only names and labels are read, not the images."""
    opened = _open(file)
    columns = set(opened.schema_arrow.names)
    leaves = {opened.schema.column(i).path for i in range(len(opened.schema))}
    if "image.bytes" not in leaves:
        raise DataError(f"source={file}: columns {sorted(columns)}; expected image (with bytes and path) and label")
    count, place = opened.metadata.num_rows, str(file.relative_to(folder))
    wanted = [name for name in ("image.path", "label") if name in leaves]
    table = opened.read(columns=wanted) if wanted else None
    paths = table.column("image").to_pylist() if "image.path" in leaves else [{}] * count
    labels = table.column("label").to_pylist() if "label" in leaves else [None] * count
    names = _class_names(opened)
    size = sum(_image_bytes(opened, group) for group in range(opened.num_row_groups)) // max(count, 1)
    entries = []
    for row, (path, label) in enumerate(zip(paths, labels, strict=True)):
        number = _NO_LABEL if label is None else int(label)
        stem = Path((path or {}).get("path") or f"{file.stem}-{row:06d}.jpg").name
        group = f"{names[number] if 0 <= number < len(names) else number}/" if number >= 0 else ""
        entries.append(Entry(group.replace(", ", "_") + stem, number, size, None, Place("parquet", place, row)))
    return names, entries


def _open(file: Path) -> pyarrow.parquet.ParquetFile:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"source={file}: pyarrow is not installed; pip install 'maskwright[parquet]'") from error
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"source={file}: not a readable parquet file: {error}; download it again") from error


def _image_bytes(opened: pyarrow.parquet.ParquetFile, group: int) -> int:
    about = opened.metadata.row_group(group)
    columns = (about.column(i) for i in range(about.num_columns))
    return sum(c.total_uncompressed_size for c in columns if c.path_in_schema == "image.bytes")


def _class_names(opened: pyarrow.parquet.ParquetFile) -> tuple[str, ...]:
    about = json.loads((opened.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    label = about.get("info", {}).get("features", {}).get("label", {})
    return tuple(label.get("names", ()))


def read_row(file: Path, row: int) -> bytes:
    """The encoded image of one row; DataError where it is not there."""
    opened, starts = _reader(file)
    group = max(g for g, start in enumerate(starts) if start <= row)
    cell = _row_group(file, group)[row - starts[group]].as_py()
    data = (cell or {}).get("bytes")
    if data is None:
        raise DataError(f"source={file}: row {row} holds no image bytes, only a path; give the files with their images")
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
