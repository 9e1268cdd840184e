"""One shard: read its images, screen them, write tar, DALI index and our index, each complete or not at all.

`make_shard` is a pure function of its part of the plan and of the source files: no time, no owner, no randomness gets
into the bytes. Files are written under a hidden name, flushed to the disk and renamed; the index comes last and
carries the hash of the part, so `finished_shard` can tell a finished shard from every other state. It can be handed
to any `concurrent.futures.Executor`; everything that it takes and gives can be pickled.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shards.dali_index import Member, format_dali_index
from shards.index import ShardIndex, format_index, parse_index, sample_checksums
from shards.layout import TAR_BLOCK, DataError, Rejection, ShardRecord, padded, sha256_hex, shard_name
from shards.making.planning import Item, ShardPlan
from shards.making.screener import BYTES, Rules, Screener, kept_screener
from shards.making.screening import Rejected, Screened
from shards.sources.reading import read_image

if TYPE_CHECKING:
    from webdataset.writer import TarWriter

_SCREENED_AHEAD = 64  # images read and screened together ...
_BYTES_AHEAD = 2**26  # ... but not more bytes than these, unless one image has them alone
_LARGEST_FILE = BYTES  # bytes: a larger image could not be decoded within the limit of memory
HIDDEN_SUFFIX = ".tmp"  # of files that are being written


@dataclass(frozen=True)
class ShardResult:
    """What became of one part of the plan. `record` is None when every image was rejected: no shard is written."""

    number: int
    record: ShardRecord | None
    rejected: tuple[Rejection, ...]


@dataclass(frozen=True)
class _Row:
    """One sample as it was written."""

    item: Item
    image: Screened
    start: int  # first byte in the tar
    members: tuple[Member, ...]


def make_shard(root: Path, out: Path, part: ShardPlan, tick: Callable[[bool], None] | None = None) -> ShardResult:
    """Write the three files of one shard into `out`; `tick(kept)` is called after every image.

    Raises DataError when a source file changed since it was listed, and OSError (with the path) when `out` cannot be
    written. Whatever is raised, also by `tick`, no partial file has a final name and no hidden one stays behind.
    """
    name = shard_name(part.number)
    rejected: list[Rejection] = []
    with hidden_file(out / f"{name}.tar") as (stream, publish):
        with closing(_judged(root, part)) as judged:  # whatever happens, nobody screens on afterwards
            rows = _write_tar(stream, judged, rejected, tick)
        if not rows:
            return ShardResult(part.number, None, tuple(rejected))
        arrays = _arrays(rows)
        tar_size, tar_sha256 = _checksums(stream, arrays)
        publish()
    dali = format_dali_index([row.members for row in rows]).encode("ascii")
    write_file(out / f"{name}.idx", dali)
    index = ShardIndex(tar_size, tar_sha256, sha256_hex(dali), part.sha256, arrays, tuple(rejected))
    packed = format_index(index)
    write_file(out / f"{name}.npz", packed)
    return _result(part.number, index, sha256_hex(packed))


def finished_shard(out: Path, part: ShardPlan) -> ShardResult | None:
    """The result of an earlier `make_shard` of the same part, or None if any of its files is not as it left them.

    The tar is judged by its size (tools/verify_shards.py reads all of it).
    """
    name = shard_name(part.number)
    try:
        packed = (out / f"{name}.npz").read_bytes()
        index = parse_index(packed, out / f"{name}.npz")
        dali = (out / f"{name}.idx").read_bytes()
        tar_size = (out / f"{name}.tar").stat().st_size
    except (OSError, DataError):
        return None
    same = (index.plan_sha256, index.tar_size, index.dali_sha256) == (part.sha256, tar_size, sha256_hex(dali))
    return _result(part.number, index, sha256_hex(packed)) if same else None


@contextmanager
def hidden_file(final: Path) -> Iterator[tuple[BufferedRandom, Callable[[], None]]]:
    """A new file under a hidden name beside `final`, and the function that gives it the final name.

    `publish` flushes the file to the disk, makes it read-only and renames it. A file that was not published is
    removed. Raises OSError with the path in it.
    """
    hidden = final.with_name(f".{final.name}.{uuid.uuid4().hex}{HIDDEN_SUFFIX}")

    def publish() -> None:
        stream.flush()
        os.fchmod(stream.fileno(), 0o444)  # memory maps of a file that is later cut end the process that reads them
        os.fsync(stream.fileno())
        os.replace(hidden, final)
        _sync_folder(final.parent)

    try:
        with open(hidden, "x+b") as stream:
            yield stream, publish
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(error.filename or final)) from error
    finally:
        hidden.unlink(missing_ok=True)


def write_file(final: Path, data: bytes) -> None:
    """Write `data` to `final`, complete or not at all."""
    with hidden_file(final) as (stream, publish):
        stream.write(data)
        publish()


def quarantine_text(rejected: Iterable[Rejection]) -> bytes:
    """The file about all images that were left out of a folder, one line each."""
    return "".join(json.dumps(entry._asdict(), sort_keys=True) + "\n" for entry in sorted(rejected)).encode("ascii")


def _judged(root: Path, part: ShardPlan) -> Iterator[tuple[Item, Screened | Rejection]]:
    """Every image of the part in its order, with its verdict; the next images are screened while these are written."""
    options = part.options
    rules = Rules(max_pixels=options.max_pixels, short_side=options.short_side, quality=options.quality)
    screener = kept_screener()  # used by the thread below alone
    with ThreadPoolExecutor(1) as ahead:
        screened: Future[list[tuple[Item, Screened | Rejection]]] | None = None
        for items in _chunks(part.items):
            following = ahead.submit(_judged_together, root, items, screener, rules)
            if screened:
                yield from screened.result()
            screened = following
        if screened:
            yield from screened.result()


def _judged_together(
    root: Path, items: Sequence[Item], screener: Screener, rules: Rules
) -> list[tuple[Item, Screened | Rejection]]:
    """Read and screen some images in one request."""
    contents = [_read(root, item) for item in items]
    images = [content for content in contents if isinstance(content, bytes)]
    verdicts = iter(screener.judge(images, rules) if images else ())
    judged: list[tuple[Item, Screened | Rejection]] = []
    for item, content in zip(items, contents, strict=True):
        verdict = content if isinstance(content, Rejected) else next(verdicts)
        data = b"" if isinstance(content, Rejected) else content
        judged.append((item, _rejection(item, verdict, data) if isinstance(verdict, Rejected) else verdict))
    return judged


def _chunks(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Cut `items` into runs that are read and screened together: few enough, and small enough to be held."""
    start = size = 0
    for position, item in enumerate(items):
        size += item.size
        if position > start and (size > _BYTES_AHEAD or position - start == _SCREENED_AHEAD):
            yield items[start:position]
            start, size = position, item.size
    yield items[start:]


def _read(root: Path, item: Item) -> bytes | Rejected:
    """The bytes of an image, or why it is left out unread."""
    try:
        if item.problem:
            return Rejected(*item.problem)
        if item.size > _LARGEST_FILE:
            return Rejected("too-large", f"{item.size:,} bytes, the limit is {_LARGEST_FILE:,}")
        return read_image(root, item)
    except Rejected as rejected:
        return rejected


def _rejection(item: Item, rejected: Rejected, data: bytes) -> Rejection:
    return Rejection(item.path, rejected.reason, rejected.detail, sha256_hex(data) if data else "")


def _write_tar(
    stream: BufferedRandom,
    judged: Iterator[tuple[Item, Screened | Rejection]],
    rejected: list[Rejection],
    tick: Callable[[bool], None] | None,
) -> list[_Row]:
    """Write the tar; returns the samples in it and appends the others to `rejected`."""
    from webdataset.writer import TarWriter  # brings torch: a second that the parent process need not spend

    rows = []
    with TarWriter(stream, user="", group="", mode=0o444, mtime=0, encoder=False) as writer:
        for item, verdict in judged:
            if isinstance(verdict, Screened):
                rows.append(_write_sample(writer, item, verdict))
            else:
                rejected.append(verdict)
            if tick:
                tick(isinstance(verdict, Screened))
    return rows


def _write_sample(writer: TarWriter, item: Item, image: Screened) -> _Row:
    """Add one sample: label where it has one, image and description, in the order of their extensions."""
    about = {"filename": item.path, "label": item.label, "height": image.height, "width": image.width}
    label = {"cls": str(item.label).encode("ascii")} if item.label >= 0 else {}
    files = {
        **label,
        image.extension: image.data,
        "json": json.dumps(about, sort_keys=True).encode("ascii"),
    }
    start = end = writer.tarstream.offset
    writer.write({"__key__": item.key, **files})
    members = []
    for extension, data in sorted(files.items()):
        members.append(Member(extension, end + TAR_BLOCK, len(data), f"{item.key}.{extension}"))
        end += TAR_BLOCK + padded(len(data))
    if writer.tarstream.offset != end:
        raise RuntimeError(f"{item.key}: webdataset.TarWriter ended at {writer.tarstream.offset}, {end} was computed")
    return _Row(item, image, start, tuple(members))


def _arrays(rows: Sequence[_Row]) -> dict[str, np.ndarray]:
    """The columns of the index but the checksums."""
    images = [next(m for m in row.members if m.extension == row.image.extension) for row in rows]
    return {
        "start": np.array([row.start for row in rows], "<i8"),
        "offset": np.array([member.offset for member in images], "<i8"),
        "size": np.array([member.size for member in images], "<i8"),
        "label": np.array([row.item.label for row in rows], "<i4"),
        "height": np.array([row.image.height for row in rows], "<i4"),
        "width": np.array([row.image.width for row in rows], "<i4"),
        "key": np.array([row.item.key.encode("ascii") for row in rows]),
        "extension": np.array([row.image.extension.encode("ascii") for row in rows]),
        "crc32": np.zeros(len(rows), "<u4"),
    }


def _checksums(stream: BufferedRandom, arrays: dict[str, np.ndarray]) -> tuple[int, str]:
    """Fill in every sample's crc32; returns the tar's size and sha256. Reads the file back, as a reader will."""
    stream.flush()
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as tar, memoryview(tar) as view:
        arrays["crc32"] = sample_checksums(view, arrays)
        return len(view), hashlib.sha256(view).hexdigest()


def _result(number: int, index: ShardIndex, index_sha256: str) -> ShardResult:
    digests = {"tar": index.tar_sha256, "npz": index_sha256, "idx": index.dali_sha256}
    record = ShardRecord(name=shard_name(number), samples=len(index), bytes=index.tar_size, sha256=digests)
    return ShardResult(number, record, index.rejected)


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
