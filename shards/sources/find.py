"""Which kind of source a path is: told in seconds, from what lies there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from shards.layout import DataError, MissingData
from shards.sources.class_folders import list_class_folders
from shards.sources.imagenet_tars import list_imagenet_tar
from shards.sources.listing import Listing
from shards.sources.parquet import list_parquet
from shards.sources.path_lists import LIST_SUFFIXES, list_paths

_VALIDATION = "ILSVRC2012_img_val.tar"
_LOOKED_AT = 10_000  # entries of a folder that decide what it is
KINDS = """expected one of
  a folder with one folder of images per class
  ILSVRC2012_img_train.tar, or ILSVRC2012_img_val.tar with --labels
  a folder with parquet files named SPLIT-*.parquet
  a list .txt, .tsv or .csv of lines `PATH LABEL`"""


def list_source(
    source: Path,
    *,
    labels: Path | None = None,
    root: Path | None = None,
    split: str = "train",
    follow_symlinks: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Listing:
    """The images of a source of any kind.

    `labels`: of the validation tar; `root`: of a list's paths; `split`: of parquet files. MissingData or DataError say
    what was found and what was expected, and DataError for an option of another kind of source.
    """
    _check_options(source, labels, root)
    if source.is_file():
        if source.suffix == ".tar":
            return list_imagenet_tar(source, labels=labels, progress=progress)
        if source.suffix in LIST_SUFFIXES:
            return list_paths(source, root=root)
        raise DataError(f"source={source}: a file of an unknown kind; {KINDS}")
    if not source.is_dir():
        raise MissingData(f"source={source}: no such file or folder; {KINDS}")
    suffixes = _suffixes(source)
    if ".parquet" in suffixes:
        return list_parquet(source, split=split, progress=progress)
    if ".tar" in suffixes:
        raise DataError(
            f"source={source}: {suffixes['.tar']:,} tars; WebDataset shards are used where they are: "
            f"python tools/index_shards.py {source}. The official tars of ImageNet are given one at a time, by name"
        )
    listing = list_class_folders(source, follow_symlinks=follow_symlinks, progress=progress)
    if all(entry.path.endswith((".parquet", ".tar")) for entry in listing.entries):
        first = listing.entries[0].path
        raise DataError(f"source={source}: no images in its folders, but {first}; give the folder of these files")
    return listing


def _check_options(source: Path, labels: Path | None, root: Path | None) -> None:
    """Labels or a root that nothing would look at must not be thought to count."""
    if labels is not None and source.suffix != ".tar":
        raise DataError(f"--labels={labels}: only {_VALIDATION} takes labels; leave it out for {source}")
    if root is not None and source.suffix not in LIST_SUFFIXES:
        raise DataError(f"--root={root}: only a list {', '.join(LIST_SUFFIXES)} has a root; leave it out for {source}")


def _suffixes(folder: Path) -> dict[str, int]:
    """How many files of each ending lie in a folder, and in its folder `data` (Hugging Face's layout)."""
    found: dict[str, int] = {}
    for place in (folder, folder / "data"):
        if place.is_dir():
            with os.scandir(place) as items:
                for number, item in enumerate(items):
                    if number == _LOOKED_AT:
                        break
                    suffix = os.path.splitext(item.name)[1].lower()
                    found[suffix] = found.get(suffix, 0) + 1
    return found
