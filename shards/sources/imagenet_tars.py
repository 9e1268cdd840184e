"""The official tars of ILSVRC2012, as they were downloaded; nothing is unpacked.

    ILSVRC2012_img_train.tar        one tar per class, n01440764.tar, each with its images n01440764_18.JPEG
    ILSVRC2012_img_val.tar          50,000 images ILSVRC2012_val_00000001.JPEG and no labels
    ILSVRC2012_devkit_t12.tar.gz    their labels, in the numbering of the challenge, and what those numbers mean

The tars are not compressed, so an image is a stretch of the big file. Classes are numbered by the bytewise order of
their WordNet ids, as everybody does; file names are kept, because later labels (ReaL) go by them.
"""

from __future__ import annotations

import csv
import io
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from shards.layout import TAR_BLOCK, DataError, MissingData, padded
from shards.sources.listing import Entry, Listing, Place

_CLASS_TAR = re.compile(r"(n\d{8})\.tar", re.ASCII)
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG", re.ASCII)
_WNID = re.compile(r"n\d{8}", re.ASCII)
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_META = "meta.mat"
_LONGEST_END = 2 * TAR_BLOCK + 20 * TAR_BLOCK  # bytes: the mark, filled up to tar's record of 20 blocks
_AGAIN = "download it again and compare its checksum"


def list_imagenet_tar(
    tar: Path, *, labels: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Listing:
    """The images of the train or of the validation tar. `progress(done, all)` counts bytes gone through.

    `labels` is needed for validation: the development kit, or a text or CSV file with a line `FILE WNID ...` per image
    (as on Kaggle). DataError saying what was found and what was expected, MissingData where a file is not there.
    """
    if not tar.is_file():
        raise MissingData(f"source={tar}: no such file; give the tar as it was downloaded")
    first = first_member(tar)
    if _CLASS_TAR.fullmatch(first):
        if labels is not None:
            raise DataError(f"--labels={labels}: the train tar {tar} has its labels in it; leave it out")
        return _train(tar, progress)
    if _VAL_IMAGE.fullmatch(first):
        return _validation(tar, labels, progress)
    raise DataError(
        f"source={tar}: begins with {first[:60]!r}; expected a class tar (n01440764.tar) or a validation image "
        "(ILSVRC2012_val_00000001.JPEG). Shards in WebDataset's layout need no conversion: tools/index_shards.py FOLDER"
    )


def first_member(tar: Path) -> str:
    """Name of a tar's first file; DataError where it is no plain tar."""
    try:
        with tarfile.open(tar, "r:") as opened:
            member = opened.next()
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"source={tar}: not an uncompressed tar: {error}; give it as it was downloaded") from error
    if member is None:
        raise DataError(f"source={tar}: an empty tar; download it again")
    return member.name


def _members(stream: BinaryIO, begin: int, size: int, what: str) -> Iterator[tarfile.TarInfo]:
    """The regular files of a tar that lies in bytes [begin, begin + size) of a file, each name once.

    Python takes a header that it cannot read for the end of the tar; so that no image is lost in silence, nothing but
    an end of the usual length may stand behind the last file. DataError for that, a cut tar and anything else in it.
    """
    last, end, names = begin, begin + size, set()
    try:
        stream.seek(begin)
        for member in tarfile.open(fileobj=stream, mode="r:") if size else ():
            if member.offset >= end:  # of the tar around this one
                break
            if not member.isreg() or member.issparse():
                raise DataError(f"{what}: {member.name[:80]!r} is no regular file; the official tars hold nothing else")
            last = member.offset_data + padded(member.size)
            if last > end:
                raise DataError(f"{what}: cut inside {member.name[:80]!r}: {size:,} bytes; {_AGAIN}")
            if member.name in names:
                raise DataError(f"{what}: {member.name[:80]!r} is in it twice; {_AGAIN}")
            names.add(member.name)
            yield member
        _check_end(stream, last, end, what)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{what}: damaged or cut: {error}; {_AGAIN}") from error


def _check_end(stream: BinaryIO, position: int, end: int, what: str) -> None:
    """Two blocks of zeros, and more of them up to a whole record, end a tar."""
    length = end - position
    if length < 2 * TAR_BLOCK:
        raise DataError(f"{what}: cut: no end-of-archive mark after the last file; {_AGAIN}")
    stream.seek(position)
    rest = stream.read(min(length, _LONGEST_END))
    if rest.count(0) != len(rest):
        raise DataError(f"{what}: the header after the last readable file is damaged; {_AGAIN}")
    if length > _LONGEST_END:
        raise DataError(
            f"{what}: {length:,} bytes after the last file, at most {_LONGEST_END:,} of zeros end a tar: a hole in it, "
            f"or more tars behind it; {_AGAIN}"
        )


def _train(tar: Path, progress: Callable[[int, int], None] | None) -> Listing:
    size, found = tar.stat().st_size, {}
    with open(tar, "rb") as stream:
        for member in _members(stream, 0, size, f"source={tar}"):
            name = _CLASS_TAR.fullmatch(member.name)
            if not name:
                raise DataError(
                    f"source={tar}: {member.name[:80]!r} between class tars; expected names like n01440764.tar"
                )
            found[name[1]] = _class_entries(tar, stream, member)
            if progress:
                progress(member.offset_data + member.size, size)
    classes = tuple(sorted(found))
    entries = (
        Entry(f"{wnid}/{name}", label, length, None, Place("tar", tar.name, position))
        for label, wnid in enumerate(classes)
        for name, position, length in sorted(found[wnid])
    )
    return Listing(tar.parent, classes, tuple(entries))


def _class_entries(tar: Path, stream: BinaryIO, member: tarfile.TarInfo) -> list[tuple[str, int, int]]:
    """(name, first byte in the big tar, bytes) of the images of one class."""
    where = f"source={tar}: {member.name}"
    entries = [(m.name, m.offset_data, m.size) for m in _members(stream, member.offset_data, member.size, where)]
    if not entries:
        raise DataError(f"{where}: no image in it; {_AGAIN}")
    folders = [name for name, _, _ in entries if "/" in name]
    if folders:
        raise DataError(f"{where}: {folders[0][:80]!r} lies in a folder; the official tars have none")
    return entries


def _validation(tar: Path, labels: Path | None, progress: Callable[[int, int], None] | None) -> Listing:
    if labels is None:
        raise DataError(
            f"source={tar}: validation images have no labels of their own; add --labels with the development kit "
            "(ILSVRC2012_devkit_t12.tar.gz) or with a file of lines `ILSVRC2012_val_00000001.JPEG n01751748`"
        )
    wnid_of = read_labels(labels)
    classes = tuple(sorted(set(wnid_of.values())))
    number = {wnid: label for label, wnid in enumerate(classes)}
    size, entries, unlabelled = tar.stat().st_size, [], []
    with open(tar, "rb") as stream:
        for member in _members(stream, 0, size, f"source={tar}"):
            if not _VAL_IMAGE.fullmatch(member.name):
                raise DataError(f"source={tar}: {member.name[:80]!r}; expected names like ILSVRC2012_val_00000001.JPEG")
            wnid = wnid_of.get(Path(member.name).stem)
            if wnid is None:
                unlabelled.append(member.name)
                continue
            place = Place("tar", tar.name, member.offset_data)
            entries.append(Entry(f"{wnid}/{member.name}", number[wnid], member.size, None, place))
            if progress:
                progress(member.offset_data, size)
    if unlabelled or len(entries) != len(wnid_of):
        first = f" (first: {unlabelled[0]})" if unlabelled else ""
        raise DataError(
            f"source={tar}: {len(entries) + len(unlabelled):,} images, --labels={labels} names {len(wnid_of):,}; "
            f"{len(unlabelled):,} images have no label{first}; give the labels of this very set"
        )
    return Listing(tar.parent, classes, tuple(sorted(entries, key=lambda entry: entry.path)))


def read_labels(file: Path) -> dict[str, str]:
    """WordNet id by the stem of the image's name, from the development kit or from lines of text."""
    if not file.is_file():
        raise MissingData(f"--labels={file}: no such file")
    if tarfile.is_tarfile(file):
        return _devkit_labels(file)
    found: dict[str, str] = {}
    for number, line in enumerate(_text_of(file).splitlines(), start=1):
        words = next(csv.reader([line.replace("\t", " ").replace(",", " ")], delimiter=" ", skipinitialspace=True), [])
        if not words or words[0] == "ImageId":
            continue
        if len(words) < 2 or not _WNID.fullmatch(words[1]):
            raise DataError(f"--labels={file}: line {number} is {line[:60]!r}; expected `FILE n01751748`")
        if found.setdefault(Path(words[0]).stem, words[1]) != words[1]:
            raise DataError(f"--labels={file}: line {number}: {words[0]} has two labels; keep one")
    if not found:
        raise DataError(f"--labels={file}: no labels in it; expected lines `FILE n01751748`")
    return found


def _text_of(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")  # Windows begins a text with a mark
    except UnicodeDecodeError as error:
        raise DataError(f"--labels={file}: no text in UTF-8: {error}; expected lines `FILE n01751748`") from error


def _devkit_labels(kit: Path) -> dict[str, str]:
    """The challenge's numbers of the validation images, translated by its table of WordNet ids."""
    with tarfile.open(kit) as opened:
        held = {Path(member.name).name: member for member in opened.getmembers() if member.isreg()}
        missing = [name for name in (_TRUTH, _META) if name not in held]
        if missing:
            raise DataError(
                f"--labels={kit}: no {' and no '.join(missing)} in it; expected ILSVRC2012_devkit_t12.tar.gz"
            )
        truth, meta = (opened.extractfile(held[name]).read() for name in (_TRUTH, _META))
    wnid_of = _challenge_numbers(meta, kit)
    numbers = [int(line) for line in truth.split()]
    unknown = set(numbers) - wnid_of.keys()
    if unknown:
        raise DataError(f"--labels={kit}: {_TRUTH} has the class {min(unknown)}, {_META} has {len(wnid_of)} classes")
    return {f"ILSVRC2012_val_{place:08d}": wnid_of[number] for place, number in enumerate(numbers, start=1)}


def _challenge_numbers(meta: bytes, kit: Path) -> dict[int, str]:
    """WordNet id by the challenge's class number, of the classes without children (1 to 1,000)."""
    try:
        from scipy.io import loadmat  # extra `imagenet`: the table is a MATLAB file
    except ImportError as error:
        raise DataError(
            f"--labels={kit}: {_META} is a MATLAB file and scipy is not installed; pip install scipy, or give a "
            "text file of lines `ILSVRC2012_val_00000001.JPEG n01751748`"
        ) from error
    rows = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows if int(row["num_children"]) == 0}
