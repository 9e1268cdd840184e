"""Which files of a tar belong together: those that lie side by side and share their name up to the first dot.

Nearly all tars are written by a program that gives every sample the same files in the same order. Such a run of
samples is taken at once, which costs a fifth of taking them one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from shards.foreign.labels import Sample, fault, shown
from shards.foreign.stretch import Place
from shards.foreign.tars import ForeignTar
from shards.layout import DataError

MOST_PARTS = 32  # files of a sample


class Run(NamedTuple):
    """Samples that all have the same files in the same order, each with at least one."""

    keys: list[bytes]
    places: dict[bytes, list[Place]]  # by extension, in the order of the files

    def sample(self, number: int) -> Sample:
        """One of them."""
        return self.keys[number], {extension: places[number] for extension, places in self.places.items()}


def read_samples(tar: ForeignTar, begin: int, first: int) -> Iterator[Sample]:
    """The samples that lie complete in the first files, and one more, of a tar from byte `begin` on.

    Raises DataError naming tar and key as `ForeignTar.stretches` does, and for files without extension, for an
    extension twice, and for a key that comes again.
    """
    yield from _one_by_one(tar, *next(tar.stretches(begin, first)), {})


def read_runs(tar: ForeignTar) -> Iterator[Run | list[Sample]]:
    """All samples of a tar, in runs where they are alike. Raises DataError as `read_samples` does."""
    seen: dict[bytes, int] = {}
    names: list[bytes] = []
    places: list[Place] = []
    for more_names, more_places in tar.stretches():
        names, places = names + more_names, places + more_places
        cut = _begin_of_last(names)  # it may go on in the next stretch
        yield _run(names[:cut], places[:cut], seen) or list(_one_by_one(tar, names[:cut], places[:cut], seen))
        names, places = names[cut:], places[cut:]
    yield list(_one_by_one(tar, names, places, seen))


def _run(names: list[bytes], places: list[Place], seen: dict[bytes, int]) -> Run | None:
    """These files as a run, if they are one and no key comes again."""
    key = _split(names[:1])[0][0] if names else b""
    if not key or not names[0].startswith(key + b"."):
        return None
    size = next((number for number, name in enumerate(names) if not name.startswith(key + b".")), len(names))
    ends = [name[len(key) :] for name in names[:size]]
    if len(names) % size or len(set(ends)) < size or any(end == b"." or end != end.lower() for end in ends):
        return None
    keys = [name[: -len(ends[0])] for name in names[::size]]
    if any([key + end for key in keys] != names[place::size] for place, end in enumerate(ends)):
        return None
    joined = b"/".join(keys)
    if b"." in joined or b"//" in b"/" + joined + b"/":  # a dot in a folder's name, or a hidden file: not so plain
        return None
    if len(set(keys)) < len(keys) or not seen.keys().isdisjoint(keys):
        return None
    seen.update(zip(keys, (place[0] for place in places[::size]), strict=True))
    return Run(keys, {end[1:]: places[place::size] for place, end in enumerate(ends)})


def _one_by_one(
    tar: ForeignTar, names: Sequence[bytes], places: Sequence[Place], seen: dict[bytes, int]
) -> Iterator[Sample]:
    """The samples that files are; `seen`: where each key began so far."""
    current, parts = None, {}
    for (key, _, extension), place in zip(_split(names), places, strict=True):
        if key != current:
            if not key:
                continue  # a hidden file
            if parts:
                yield current, parts
            if key in seen:
                raise _again(tar, key, seen[key], place[0])
            current, parts, seen[key] = key, {}, place[0]
        if not extension:
            raise fault(tar, key, "a file without extension belongs to no sample", "repack the tar without it")
        extension = extension.lower()
        if extension in parts:
            raise _twice(tar, key, extension, parts[extension][1], place[1])
        parts[extension] = place
    if parts:
        yield current, parts


def _begin_of_last(names: Sequence[bytes]) -> int:
    """Where the files of the last sample begin, hidden ones between them included.

    A sample of far too many files is not looked through to its beginning: it will be refused.
    """
    last = b""
    for number in range(1, min(len(names), 2 * MOST_PARTS) + 1):
        key = _split(names[-number : len(names) - number + 1])[0][0]
        if last and key not in (b"", last):
            return len(names) - number + 1
        last = last or key
    return max(0, len(names) - 2 * MOST_PARTS)


def _split(names: Sequence[bytes]) -> list[tuple[bytes, bytes, bytes]]:
    """(key, dot, extension) of names; the key is empty for hidden files, such as macOS adds."""
    if b"/" not in b"".join(names):
        return [name.partition(b".") for name in names]
    found = []
    for name in names:
        folder, slash, base = name.rpartition(b"/")
        stem, dot, extension = base.partition(b".")
        found.append((folder + slash + stem if stem else b"", dot, extension))
    return found


def _twice(tar: ForeignTar, key: bytes, extension: bytes, one: int, other: int) -> DataError:
    where = f"at bytes {one:,} and {other:,}"
    return fault(tar, key, f"two {shown(extension)}, {where}: a duplicate, or two samples of one key")


def _again(tar: ForeignTar, key: bytes, one: int, other: int) -> DataError:
    where = f"at bytes {one:,} and {other:,}"
    return fault(tar, key, f"the same key {where}: two samples, or one whose files are not side by side")
