"""The samples of a tar in WebDataset's layout that somebody else made, as our index of it.

The files of a sample lie side by side and share their name up to the first dot: KEY.jpg and KEY.cls, or KEY.json with
a `label`. What cannot be read in exactly one way (a key twice, a sample in two places, two images, no image, a label
that is no number) is refused; images that cannot be trained on are left out and listed. Hidden files are passed over.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np

from shards.foreign.grouping import MOST_PARTS, Run, read_runs, read_samples
from shards.foreign.labels import Sample, check_labels, class_name_of, fault, label_of, labels_of_run, shown
from shards.foreign.stretch import Place
from shards.foreign.tars import ForeignTar
from shards.image_headers import read_image_header
from shards.index import ForeignIndex, ShardIndex
from shards.layout import DataError, Rejection, escape_key
from shards.making.screening import Rejected

_EXPECTED = "expected are one image (jpg, jpeg, png or webp) and a label, if there are any, in cls or in json's `label`"
_LOOKED_AT = 5  # samples that tell a layout
_IMAGES = (b"jpg", b"jpeg", b"png", b"webp")
_NAMES = ("start", "offset", "size", "label", "height", "width", "key", "extension")
_NOTHING_TO_ESCAPE = (string.ascii_letters + string.digits + "_").encode()


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


def index_tar(path: Path) -> TarContents:
    """Index a tar. Reads headers, labels and the beginnings of images.

    Raises DataError, naming tar and key, for everything that cannot be read in exactly one way, and where no image
    is left.
    """
    columns = _Columns()
    with ForeignTar(path) as tar:
        for samples in read_runs(tar):
            _add_all(columns, tar, samples)
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
    label_keys = {stands_in: shown(key) for stands_in, key in columns.label_keys.items()}
    return TarContents(index, components, label_keys, columns.class_names)


def layout_of(path: Path) -> list[str]:
    """Components of a tar's first samples, such as `["cls jpg", ...]`; DataError where one has not exactly one image.

    Tells a wrong layout at once, however long the tar is.
    """
    with ForeignTar(path) as tar:
        samples = list(islice(read_samples(tar, 0, (_LOOKED_AT + 1) * MOST_PARTS), _LOOKED_AT))
        if not samples:
            raise tar.fault("no samples in it", f"give a folder of WebDataset shards; {_EXPECTED}")
        for sample in samples:
            _image_of(tar, sample)
        return [_listed(parts) for _, parts in samples]


def moved_sample(path: Path, index: ShardIndex | ForeignIndex) -> str:
    """A sample that is not where the index has it, in words; nothing if the first, one in the middle and the last are.

    Enough to tell another tar of the same size.
    """
    columns = [index.arrays[name] for name in ("start", "offset", "size", "key")]
    try:
        with ForeignTar(path) as tar:
            for row in sorted({0, len(index) // 2, len(index) - 1}):
                start, offset, size, key = (column[row].item() for column in columns)
                if not _holds_sample(tar, start, key, offset, size):
                    return f"no {key.decode()} at byte {start:,}"
    except DataError as error:
        return str(error)
    return ""


def _holds_sample(tar: ForeignTar, start: int, key: bytes, offset: int, size: int) -> bool:
    """Whether the sample with this key begins at byte `start` and has its image at `offset`.

    The index has keys escaped, and so have tars of ours.
    """
    try:
        found, parts = next(read_samples(tar, start, 2 * MOST_PARTS))
        place = parts[_image_of(tar, (found, parts))]
    except (DataError, StopIteration):
        return False
    return key in (found, _escaped([found])[0]) and place[1:3] == (offset, size)


def _add_all(columns: _Columns, tar: ForeignTar, samples: Run | list[Sample]) -> None:
    """Add samples, a run of them at once where its labels are as plain as its files."""
    labels = labels_of_run(tar, samples.places) if isinstance(samples, Run) else None
    if labels is None:
        for sample in samples if isinstance(samples, list) else map(samples.sample, range(len(samples.keys))):
            _add(columns, tar, sample)
        return
    layout = _layout(columns, tar, samples.sample(0))
    layout.number += len(samples.keys)
    _note_label(columns, tar, samples.keys[0], "cls" if b"cls" in samples.places else "none")
    if b"json" in samples.places:
        for key, label, place in zip(samples.keys, labels, samples.places[b"json"], strict=True):
            if label not in columns.class_names:
                columns.class_names[label] = class_name_of(tar, (key, {b"json": place}))
    starts = (place[0] for place in next(iter(samples.places.values())))
    for row in zip(samples.keys, starts, samples.places[layout.image], labels, strict=True):
        _add_image(columns, tar, layout.image, *row)


def _add(columns: _Columns, tar: ForeignTar, sample: Sample) -> None:
    key, parts = sample
    layout = _layout(columns, tar, sample)
    layout.number += 1
    label, stands_in = label_of(tar, sample)
    _note_label(columns, tar, key, stands_in)
    if b"json" in parts and label not in columns.class_names:
        columns.class_names[label] = class_name_of(tar, sample)
    _add_image(columns, tar, layout.image, key, next(iter(parts.values()))[0], parts[layout.image], label)


def _layout(columns: _Columns, tar: ForeignTar, sample: Sample) -> _Layout:
    """What is known of samples with these files; the first of them must have one image."""
    names = tuple(sample[1])
    if names not in columns.layouts:
        columns.layouts[names] = _Layout(_image_of(tar, sample))
    return columns.layouts[names]


def _note_label(columns: _Columns, tar: ForeignTar, key: bytes, stands_in: str) -> None:
    """DataError where a sample has its label in another place than those before it."""
    if stands_in not in columns.label_keys:
        columns.label_keys[stands_in] = key
        check_labels({kind: f"{tar.path}:{shown(first)}" for kind, first in columns.label_keys.items()})


def _add_image(
    columns: _Columns, tar: ForeignTar, extension: bytes, key: bytes, start: int, place: Place, label: int
) -> None:
    _, offset, size, head = place
    try:
        kind, height, width = read_image_header(head, size, lambda begin, length: tar.read(offset + begin, length))
    except Rejected as rejected:
        path = (key + b"." + extension).decode("utf-8", "surrogateescape")
        columns.rejected.append(Rejection(path, rejected.reason, rejected.detail, ""))
        return
    columns.rows.append((start, offset, size, label, height, width, key, kind))


def _image_of(tar: ForeignTar, sample: Sample) -> bytes:
    """Extension of a sample's one image."""
    key, parts = sample
    images = [extension for extension in _IMAGES if extension in parts]
    if len(images) != 1:
        raise fault(tar, key, f"has {len(images) or 'no'} images, found are {_listed(parts)[:200]}; {_EXPECTED}")
    if len(parts) > MOST_PARTS:
        raise fault(tar, key, f"has {len(parts)} files, at most {MOST_PARTS} are read")
    return images[0]


def _listed(extensions: Sequence[bytes] | dict[bytes, Place]) -> str:
    return shown(b" ".join(sorted(extensions)))


def _arrays(columns: _Columns) -> dict[str, np.ndarray]:
    arrays = dict(zip(_NAMES, zip(*columns.rows, strict=True), strict=True))
    arrays["key"] = _escaped(arrays["key"])
    return {name: np.array(values, ForeignIndex.ARRAYS[name]) for name, values in arrays.items()}


def _escaped(keys: Sequence[bytes]) -> Sequence[bytes]:
    """`escape_key` of every key; most sets have nothing to escape."""
    if not b"".join(keys).translate(None, _NOTHING_TO_ESCAPE):
        return keys
    return [escape_key(key.decode("utf-8", "surrogateescape")).encode("ascii") for key in keys]
