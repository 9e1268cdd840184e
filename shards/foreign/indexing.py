"""Index shards that somebody else made, in place; and check that an index is still that of its tars.

Every tar is read by a call of its own (headers, labels, beginnings of images), so any number of processes give the
same index. A rerun reads every tar again and writes only what is missing or no longer true. The JSON file of the set
is written last, and only when everything agrees: then `shards.dataset.open_dataset` takes the folder as it is.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.checking.verify import Finding
from shards.foreign.hints import one_split, parse_class_names, read_class_names
from shards.foreign.index_files import (
    SetIndex,
    differing_tars,
    find_index,
    find_tars,
    index_homes,
    set_name,
    split_place,
)
from shards.foreign.jobs import Indexed, check_tar, make_index, write_if_new
from shards.foreign.labels import check_labels
from shards.foreign.samples import layout_of
from shards.layout import MANIFEST, PLAN, DataError, MissingData, Rejection
from shards.processes import call_each

_NAMED = 3  # tars or images named in a message
Progress = Callable[[int, int], None]  # tars done, all tars


@dataclass(frozen=True)
class Report:
    """What was found and done."""

    index: SetIndex
    home: Path  # of the index
    made: int  # tars whose index was written now; that of the others was right already
    rejected: tuple[tuple[str, Rejection], ...]  # name of the tar, image
    samples: dict[str, int]  # by name of the tar, rejected ones too


def look(place: Path) -> tuple[list[Path], list[str]]:
    """The tars of `DIR` or `DIR/PATTERN`, and the components of the first samples; takes no time.

    Raises MissingData or DataError, saying what was found and what was expected, unless it is one set of shards.
    """
    tars, (folder, _) = find_tars(place), split_place(place)
    if (folder / MANIFEST).is_file():
        raise DataError(f"{place}: shards of ours (it has a {MANIFEST}) need no index: train with data.train={folder}")
    if (folder / PLAN).exists():
        raise DataError(f"{place}: a conversion of ours that was not finished ({PLAN}): run tools/make_shards.py again")
    if not tars:
        raise MissingData(f"{place}: {_instead(place)}; expected is a folder of tars in WebDataset's layout")
    one_split(place, tars)
    return tars, layout_of(tars[0])


def index_shards(
    place: Path,
    *,
    num_workers: int | None = None,
    max_bad_fraction: float = 0.001,
    class_names: Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Index `DIR` or `DIR/PATTERN`; the tars are only read.

    `num_workers` processes (default: one per core). `class_names`: a file with one name per line.

    Raises ValueError for impossible options; MissingData and DataError, naming tar and key, for everything that cannot
    be read in exactly one way, for labels in different places, a key in two tars, labels beyond the class names, and
    where more than `max_bad_fraction` of the images are unusable. Then no set is declared.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction={max_bad_fraction}: a share from 0 to 1 is needed")
    tars, _ = look(place)
    folder, _ = split_place(place)
    home = _writable_home(folder)
    made = _indexed(tars, home, _number(num_workers), progress)
    check_labels({kind: f"{folder / one.record.name}:{key}" for one in made for kind, key in one.label_keys.items()})
    _check_keys(folder, made)
    rejected = tuple((one.record.name, image) for one in made for image in one.rejected)
    _check_share(place, made, rejected, max_bad_fraction)
    classes, named_by = _classes(place, made, class_names)
    index = SetIndex(
        tars=tuple(one.record for one in made),
        classes=classes,
        named_by=named_by,
        labels=next(iter(made[0].label_keys)),
        components=dict(sum((one.components for one in made), Counter())),
        rejected=dict(Counter(image.reason for _, image in rejected)),
    )
    write_if_new(home / set_name(place), index.text().encode("ascii"))
    samples = {one.record.name: one.record.samples + len(one.rejected) for one in made}
    return Report(index, home, sum(one.written for one in made), rejected, samples)


def check_foreign(
    place: Path, decode: bool = False, *, num_workers: int | None = None, progress: Progress | None = None
) -> list[Finding]:
    """Everything that is wrong with an indexed `DIR` or `DIR/PATTERN`; empty when all is well.

    Every tar is indexed again and compared; with `decode`, every image is decoded as training does. Raises MissingData
    where there is no index: then nothing is promised.
    """
    try:
        opened = find_index(place)
    except MissingData:
        raise
    except DataError as error:
        return [Finding(set_name(place), "", str(error))]
    findings = [Finding(name, "", state) for name, state in differing_tars(opened)]
    absent = {finding.file for finding in findings}
    present = [record for record in opened.index.tars if record.name not in absent]
    jobs = [(opened, record, decode) for record in present]
    results: dict[int, list[Finding]] = {}
    for position, future in call_each(check_tar, jobs, _number(num_workers)):
        try:
            results[position] = future.result()
        except BrokenProcessPool as error:
            what = f"the process died that read this tar ({error}): killed, or out of memory"
            results[position] = [Finding(present[position].name, "", what)]
        if progress:
            progress(len(results), len(present))
    return findings + [finding for position in sorted(results) for finding in results[position]]


def _number(num_workers: int | None) -> int:
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"workers={num_workers}: at least 1 process is needed")
    return num_workers or len(os.sched_getaffinity(0))


def _instead(place: Path) -> str:
    """What lies where no tars are."""
    folder, pattern = split_place(place)
    if not folder.is_dir():
        return "no such folder; a folder is needed, or a pattern in quotes such as 'DIR/imagenet-train-*.tar'"
    with os.scandir(folder) as items:
        names = sorted((item.name, item.is_dir()) for item in items)
    inside = [name for name, is_folder in names if is_folder and find_tars(folder / name)]
    if inside:
        return f"no tars in it, but in {', '.join(inside[:_NAMED])}: give one of these folders"
    suffixes = Counter(os.path.splitext(name)[1] or "no ending" for name, is_folder in names if not is_folder)
    files = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes.most_common(_NAMED)) or "no files"
    folders = sum(is_folder for _, is_folder in names)
    matching = f" that match {pattern}" if pattern != "*.tar" else ""
    return f"no tars{matching} in it; found are {files} and {folders:,} folders"


def _writable_home(folder: Path) -> Path:
    for home in index_homes(folder):
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(home, os.W_OK | os.X_OK):
            return home
    places = " nor ".join(map(str, index_homes(folder)))
    raise DataError(f"{folder}: neither {places} can be written; set XDG_CACHE_HOME to a folder that can")


def _indexed(tars: Sequence[Path], home: Path, num_workers: int, progress: Progress | None) -> list[Indexed]:
    """Index every tar; DataError naming the first few that cannot be."""
    made: dict[int, Indexed] = {}
    failed: dict[int, DataError] = {}
    try:
        for position, future in call_each(make_index, [(tar, home) for tar in tars], num_workers):
            try:
                made[position] = future.result()
            except DataError as error:
                failed[position] = error
            if progress:
                progress(len(made) + len(failed), len(tars))
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died (killed, or out of memory); run the command again, with fewer --workers if it "
            "happens again"
        ) from error
    if failed:
        first = [str(failed[position]) for position in sorted(failed)]
        more = f"\n(and {len(first) - _NAMED:,} more tars)" if len(first) > _NAMED else ""
        raise DataError("\n".join(first[:_NAMED]) + more)
    return [made[position] for position in range(len(tars))]


def _check_keys(folder: Path, made: Sequence[Indexed]) -> None:
    """DataError naming a key that two tars have."""
    keys = np.concatenate([one.keys for one in made])
    keys.sort()  # in place: there may be ten million
    twice = keys[1:][keys[1:] == keys[:-1]]
    if len(twice):
        one, other = [one.record.name for one in made if (one.keys == twice[0]).any()][:2]
        raise DataError(
            f"{folder / other}:{twice[0].decode()}: the same key as in {one} ({len(twice):,} keys come twice); take "
            "out the tar that is there twice, or repack under keys of their own"
        )


def _check_share(
    place: Path, made: Sequence[Indexed], rejected: Sequence[tuple[str, Rejection]], max_bad_fraction: float
) -> None:
    total = sum(one.record.samples for one in made) + len(rejected)
    if len(rejected) <= max_bad_fraction * total:
        return
    first = ", ".join(f"{tar}:{image.path} ({image.reason}: {image.detail})" for tar, image in rejected[:_NAMED])
    raise DataError(
        f"{place}: {len(rejected):,} of {total:,} images are unusable, allowed are {max_bad_fraction:g} of them; first "
        f"{first}; add --max-bad-fraction {len(rejected) / total:.2g} if that is meant"
    )


def _classes(place: Path, made: Sequence[Indexed], file: Path | None) -> tuple[tuple[str, ...], str]:
    """Names of the classes by their number, and where they come from: a file, json, or the numbers themselves."""
    top, key = max((one.top for one in made), key=lambda top: top[0])
    if top < 0:
        return (), "none"
    given = parse_class_names(file) if file else read_class_names(split_place(place)[0])
    if given is not None:
        if top >= len(given):
            raise DataError(
                f"{place}: {key} has the label {top}, {len(given):,} class names are given; correct classnames.txt, or "
                "add --classnames FILE"
            )
        return given, "classnames.txt"
    told: dict[int, str] = {}
    for one in made:
        for label, name in one.class_names.items():
            told[label] = name if told.setdefault(label, name) == name else ""
    names = tuple(told.get(label, "") for label in range(top + 1))
    if all(names) and len(set(names)) == len(names):
        return names, "json"
    return tuple(map(str, range(top + 1))), "numbers"
