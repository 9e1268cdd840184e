"""What lies beside shards that somebody else made: names of classes, promised numbers, and traces of several splits.

timm writes `_info.json` (splits with their files and counts), CLIP-benchmark `nshards.txt` in each split's folder and
`classnames.txt` beside these folders. None of it is needed; where it says more than the tars, that is told.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from shards.layout import TIMM_INFO, DataError

CLASS_NAMES, NUM_SHARDS = "classnames.txt", "nshards.txt"
_SPLIT = re.compile(r"(?<![a-z])(train|val|valid|validation|test)(?![a-z])")
_NUMBERED = re.compile(r"(.*?)([0-9]+)([^0-9]*)", re.DOTALL)
_NAMED = 5  # numbers or files named in a message


def one_split(place: Path, tars: Sequence[Path]) -> None:
    """DataError with what to type instead, where the names of the tars tell of more than one split."""
    splits = defaultdict(list)
    for tar in tars:
        for word in _SPLIT.findall(tar.stem.lower())[:1]:
            splits[word].append(tar)
    if len(splits) < 2:
        return
    found = ", ".join(f"{len(files):,} of {word}" for word, files in splits.items())
    patterns = (str(files[0].parent / f"{_before(files[0].stem, word)}*.tar") for word, files in splits.items())
    raise DataError(f"{place}: holds several splits ({found}); name one of them: {' or '.join(map(repr, patterns))}")


def read_class_names(folder: Path) -> tuple[str, ...] | None:
    """One name per line of classnames.txt, in the folder or, in CLIP-benchmark's layout, beside it; None without it."""
    places = [folder, *([folder.parent] if (folder / NUM_SHARDS).is_file() else [])]
    for file in (place / CLASS_NAMES for place in places):
        if file.is_file():
            return parse_class_names(file)
    return None


def parse_class_names(file: Path) -> tuple[str, ...]:
    """One name per line; DataError where that is not what the file holds."""
    try:
        names = tuple(line.strip() for line in file.read_text("utf-8-sig").rstrip("\n").split("\n"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read: {error}; one class name per line is needed") from error
    if not all(names):
        raise DataError(f"{file}: line {names.index('') + 1} is empty; one class name per line is needed")
    return names


def shortfalls(folder: Path, samples: Mapping[str, int]) -> list[str]:
    """Where the set is not what the files beside it or the numbers in its names promise. `samples` by tar, in order."""
    return [*_gaps(samples), *_fewer_shards(folder, len(samples)), *_unlike_timm_info(folder, samples)]


def _gaps(samples: Mapping[str, int]) -> list[str]:
    series = defaultdict(set)
    for name in samples:
        numbered = _NUMBERED.fullmatch(name)
        if numbered:
            series[numbered[1], numbered[3], len(numbered[2])].add(int(numbered[2]))
    notes = []
    for (before, after, width), numbers in series.items():
        missing = sorted(set(range(min(numbers), max(numbers) + 1)) - numbers) if max(numbers) < 10**6 else []
        if missing:
            first = ", ".join(f"{before}{number:0{width}d}{after}" for number in missing[:_NAMED])
            notes.append(f"{len(missing):,} numbers are missing between the tars: {first}{_more(missing)}")
    return notes


def _fewer_shards(folder: Path, present: int) -> list[str]:
    try:
        promised = int((folder / NUM_SHARDS).read_text("ascii"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        return [f"{NUM_SHARDS} cannot be read: {error}"]
    return [f"{NUM_SHARDS} promises {promised:,} tars, {present:,} are here"] if promised != present else []


def _unlike_timm_info(folder: Path, samples: Mapping[str, int]) -> list[str]:
    try:
        splits = json.loads((folder / TIMM_INFO).read_bytes())["splits"].values()
        promised = [dict(zip(split["filenames"], split["shard_lengths"], strict=True)) for split in splits]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return [f"{TIMM_INFO} cannot be read: {type(error).__name__}: {error}"]
    ours = next((split for split in promised if split.keys() & samples.keys()), {})
    missing = [name for name in ours if name not in samples]
    differing = [name for name in samples if name in ours and ours[name] != samples[name]]
    notes = []
    if missing:
        first = ", ".join(missing[:_NAMED])
        notes.append(f"{TIMM_INFO} names {len(missing):,} more tars of this split: {first}{_more(missing)}")
    notes += [
        f"{TIMM_INFO} promises {ours[name]:,} samples in {name}, it holds {samples[name]:,}"
        for name in differing[:_NAMED]
    ]
    return notes


def _more(things: Sequence[object]) -> str:
    return " ..." if len(things) > _NAMED else ""


def _before(stem: str, word: str) -> str:
    """A stem up to the end of a word in it."""
    return stem[: stem.lower().index(word) + len(word)]
