"""Bad and odd inputs for everything that reads data: `python tests/corpus.py DIR` writes them to a folder.

    DIR/conversion/source/things/   images and other things in a class folder, to be converted
    DIR/foreign/bad.tar             the same images in a tar that somebody else made
    DIR/tars/NAME/bad.tar           tars that somebody else made
    DIR/shards/NAME/                shards of ours that were damaged
    DIR/folders/NAME/source/        sources that are none
    DIR/texts/NAME/...              indexes, manifests and lists

They are the entries of table 4A in specs/faults.md on conversion, shards and reading, and more that comes in the wild.
Rows 46 to 48 (what happens while we work) are in test_changed_shards.py and test_conversion_faults.py, row 64 in
test_exactly_once.py. tests/test_corpus.py puts all of it through the product.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import corpus_path  # noqa: F401
from corpus_entries import KEPT, PNG, BadFile, BadFolder, BadImage, BadTar, BadText, Entry
from corpus_files import files, folders
from corpus_images import images
from corpus_shards import damages
from corpus_tars import tars
from corpus_texts import texts
from foreign_sets import write_tar
from images import make_class_folders

from shards.making.conversion import convert
from shards.making.planning import Options, make_plan
from shards.sources.class_folders import list_class_folders

CLASS = "things"
_SUFFIXES = {"dali": "shard.idx", "manifest": "manifest.json", "set": "index.json", "index": "x.npz", "list": "x.txt"}


@cache
def all_entries() -> dict[str, tuple[Entry, ...]]:
    """Everything by the part of the corpus that it is in; names are unique in their part."""
    found = {
        "images": images(),
        "files": tuple(files()),
        "tars": tuple(tars()),
        "shards": tuple(damages()),
        "folders": tuple(folders()),
        "texts": tuple(texts()),
    }
    for part, entries in found.items():
        names = [entry.name for entry in entries]
        assert len(set(names)) == len(names), f"{part}: {sorted(name for name in names if names.count(name) > 1)}"
    return found


def places(folder: Path, entries: Sequence[Entry]) -> list[Path]:
    """A folder for each entry, with a name that says what it is."""
    return [folder / f"{n:03d}_{re.sub('[^a-z0-9]+', '_', e.name.lower())[:60]}" for n, e in enumerate(entries)]


def write_source(folder: Path, entries: Sequence[BadImage | BadFile]) -> None:
    """A class folder with everything that can lie in one, and a class of two good images beside it."""
    things = folder / "source" / CLASS
    things.mkdir(parents=True)
    make_class_folders(folder / "source", classes=1, per_class=2)
    for entry in entries:
        path = os.path.join(os.fsencode(things), os.fsencode(entry.name))
        if isinstance(entry, BadImage):
            Path(os.fsdecode(path)).write_bytes(entry.data)
        else:
            entry.make(path)


def key_of(number: int) -> str:
    """The key of an image in the tar of `write_foreign`."""
    return f"s{number:04d}"


def write_foreign(folder: Path, entries: Sequence[BadImage]) -> None:
    """One tar with all images, and without labels."""
    folder.mkdir(parents=True)
    write_tar(folder / "bad.tar", [(f"{key_of(number)}.jpg", entry.data) for number, entry in enumerate(entries)])


def write_tars(folder: Path, entries: Sequence[BadTar]) -> list[Path]:
    """A folder per tar; returns the folders."""
    written = places(folder, entries)
    for place, entry in zip(written, entries, strict=True):
        place.mkdir(parents=True)
        entry.make(place / "bad.tar")
    return written


def write_shards(folder: Path, entries: Sequence[BadFolder]) -> list[Path]:
    """A damaged copy of the same shards per entry; returns the folders."""
    source, whole = folder / "source", folder / "whole"
    make_class_folders(source, classes=2, per_class=4)
    (source / "n00000000" / "bad.JPEG").write_bytes(b"<html>404 Not Found</html>")
    convert(
        make_plan(list_class_folders(source), Options(samples_per_shard=3)), whole, num_workers=1, max_bad_fraction=1
    )
    written = places(folder, entries)
    for place, entry in zip(written, entries, strict=True):
        shutil.copytree(whole, place)
        entry.make(place)
    return written


def write_folders(folder: Path, entries: Sequence[BadFolder]) -> list[Path]:
    """A source per entry; returns the sources."""
    written = [place / "source" for place in places(folder, entries)]
    for place, entry in zip(written, entries, strict=True):
        place.mkdir(parents=True)
        entry.make(place)
    return written


def write_texts(folder: Path, entries: Sequence[BadText]) -> list[Path]:
    """A file per entry, beside images that a list may name; returns the files."""
    written = [place / _SUFFIXES[entry.parser] for place, entry in zip(places(folder, entries), entries, strict=True)]
    for place, entry in zip(written, entries, strict=True):
        place.parent.mkdir(parents=True)
        place.write_bytes(entry.data)
        for name in ("a.jpg", "b.jpg", "a b.jpg") if entry.parser == "list" else ():
            (place.parent / name).write_bytes(PNG)
    return written


def write(folder: Path) -> dict[str, list[Path]]:
    """Write all of it; returns the place of each entry of those parts whose entries have one each."""
    parts = all_entries()
    write_source(folder / "conversion", (*parts["images"], *parts["files"]))
    write_foreign(folder / "foreign", parts["images"])
    return {
        "tars": write_tars(folder / "tars", parts["tars"]),
        "shards": write_shards(folder / "shards", parts["shards"]),
        "folders": write_folders(folder / "folders", parts["folders"]),
        "texts": write_texts(folder / "texts", parts["texts"]),
    }


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/corpus.py DIR")
    write(Path(sys.argv[1]))
    for part, entries in all_entries().items():
        bad = sum(entry.fate != KEPT for entry in entries)
        rows = sorted({entry.row for entry in entries} - {0})
        print(f"{part:8} {len(entries):4} entries, {bad:4} to be left out or refused; rows {', '.join(map(str, rows))}")
