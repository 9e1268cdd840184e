"""Bring back the small files of a folder of shards; its tars are never touched.

Everything here is a proposal: it is written only if it has the very bytes that the manifest promises. So a repair
cannot declare anything, and a folder that was repaired is the folder that was made. An index of DALI's follows from its
tar; ours too, but for the hash of the plan and the images left out, which come from what is left of the damaged file
or, where nothing was left out of an unchanged source of files, from the tar. What cannot be proved is made again by a
rerun of the conversion, which `again` spells out.
"""

from __future__ import annotations

import json
import shlex
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from shards.array_archives import read_array
from shards.checking.tar_contents import Contents, mapped, read_contents
from shards.dali_index import format_dali_index
from shards.index import ShardIndex, format_index, parse_index, sample_checksums
from shards.layout import (
    IMAGE_EXTENSIONS,
    MANIFEST,
    OTHER_FILES,
    PLAN,
    QUARANTINE,
    SHARD_SUFFIXES,
    TAR_BLOCK,
    TIMM_INFO,
    DataError,
    Manifest,
    Rejection,
    ShardRecord,
    read_manifest,
    sha256_hex,
)
from shards.making.conversion import claim_text, timm_info
from shards.making.planning import Item, Options, ShardPlan
from shards.making.writer import quarantine_text, write_file


def repair(folder: Path) -> list[str]:
    """Rebuild what is missing, stale, swapped or damaged beside the tars; returns the names of what was written.

    Without a sound manifest nothing can be proved. Raises MissingData where there is none, OSError (with the path)
    where nothing can be written.
    """
    try:
        manifest = read_manifest(folder)
    except DataError:
        if (folder / MANIFEST).exists():
            return []
        raise
    misplaced = {sha256_hex(data): data for path in folder.iterdir() if (data := _small_file(path)) is not None}
    written = []
    for record in manifest.shards:
        for suffix, proposals in (("idx", _dali_indexes), ("npz", _indexes)):
            name, digest = record.file(suffix), record.sha256[suffix]
            if _damaged(folder / name, digest):
                known = [misplaced[digest]] if digest in misplaced else proposals(folder, record, manifest)
                written += _write_proved(folder / name, digest, known)
    for name, proposals in ((PLAN, _claims), (TIMM_INFO, _infos), (QUARANTINE, _quarantines)):
        digest = manifest.files.get(name, "")
        if digest and _damaged(folder / name, digest):
            written += _write_proved(folder / name, digest, proposals(folder, manifest))
    return written


def again(folder: Path, files: Iterable[str]) -> str:
    """The shell commands that make `files` of `folder` again; nothing for files that no conversion makes.

    SRC stands for the source with its own options (--labels, --root), which no manifest names.
    """
    options = ["..."]  # those of the command that made it
    ours = {MANIFEST, *OTHER_FILES}
    with suppress(DataError):
        manifest = read_manifest(folder)
        ours |= {record.file(suffix) for record in manifest.shards for suffix in SHARD_SUFFIXES}
        options = _options(manifest.plan)
    names = sorted(ours.intersection(files))
    delete = [shlex.quote(str(folder / name)) for name in names if (folder / name).exists()]
    commands = [f"rm -f {' '.join(delete)}"] if delete else []
    commands.append(f"python tools/make_shards.py SRC {shlex.quote(str(folder))} {' '.join(options)}")
    return " && ".join(commands) if names else ""


def _options(plan: Mapping[str, Any]) -> list[str]:
    """The options of tools/make_shards.py that shape such shards."""
    values = {"seed": plan["seed"], "samples-per-shard": plan["samples_per_shard"], "split": plan["split"]}
    if plan["short_side"]:
        values |= {"short-side": plan["short_side"], "quality": plan["quality"]}
    options = [text for name, value in values.items() for text in (f"--{name}", shlex.quote(str(value)))]
    return options if plan["shuffle"] else [*options, "--no-shuffle"]


def _small_file(path: Path) -> bytes | None:
    """The bytes of a file that may be a misplaced index."""
    with suppress(OSError):
        if path.suffix in (".idx", ".npz") and path.is_file():
            return path.read_bytes()
    return None


def _damaged(file: Path, digest: str) -> bool:
    try:
        return sha256_hex(file.read_bytes()) != digest
    except FileNotFoundError:
        return True


def _write_proved(file: Path, digest: str, proposals: Iterable[bytes]) -> list[str]:
    """Write the first proposal that is what the manifest promises; returns the name if there is one."""
    for data in proposals:
        if sha256_hex(data) == digest:
            write_file(file, data)
            return [file.name]
    return []


def _contents(folder: Path, record: ShardRecord) -> Contents | None:
    try:
        return read_contents(folder / record.file("tar"))
    except (OSError, tarfile.TarError):
        return None  # a tar that cannot be read proves nothing


def _dali_indexes(folder: Path, record: ShardRecord, manifest: Manifest) -> Iterator[bytes]:
    if contents := _contents(folder, record):
        yield format_dali_index(list(contents.members.values())).encode("ascii", "replace")


def _indexes(folder: Path, record: ShardRecord, manifest: Manifest) -> Iterator[bytes]:
    """Our index with every pair of (hash of the plan, images left out) that may be the right one."""
    file = folder / record.file("tar")
    contents = _contents(folder, record)
    arrays = _arrays(file, contents) if contents else None
    if contents is None or arrays is None:
        return
    for plan_sha256, rejected in (_remembered(folder / record.file("npz")), (_part(contents, manifest), ())):
        if plan_sha256:
            yield format_index(
                ShardIndex(
                    file.stat().st_size, record.sha256["tar"], record.sha256["idx"], plan_sha256, arrays, rejected
                )
            )


def _arrays(file: Path, contents: Contents) -> dict[str, np.ndarray] | None:
    """The columns of the index from the tar alone; None where they cannot be told."""
    columns: dict[str, list] = {name: [] for name in ShardIndex.ARRAYS if name != "crc32"}
    try:
        for key, members in contents.members.items():
            about = json.loads(contents.about[key]["json"])
            (image,) = (member for member in members if member.extension in IMAGE_EXTENSIONS)
            row = {"start": members[0].offset - TAR_BLOCK, "offset": image.offset, "size": image.size}
            row |= {name: about[name] for name in ("label", "height", "width")}
            row |= {"key": key.encode("ascii"), "extension": image.extension.encode("ascii")}
            for name, value in row.items():
                columns[name].append(value)
        arrays = {name: np.array(values).astype(ShardIndex.ARRAYS[name]) for name, values in columns.items()}
        with mapped(file) as tar:
            return arrays | {"crc32": sample_checksums(tar, arrays)}
    except (ValueError, TypeError, KeyError, OverflowError):
        return None


def _remembered(file: Path) -> tuple[str, tuple[Rejection, ...]]:
    """What only the index itself knows, from those members of a damaged one that are whole."""
    try:
        data = file.read_bytes()
        meta, rejected = (json.loads(read_array(data, name).tobytes()) for name in ("meta", "rejected"))
        return meta["plan_sha256"], tuple(Rejection(*entry) for entry in rejected)
    except Exception:  # as in `index.parse_index`: damaged bytes raise many kinds
        return "", ()


def _part(contents: Contents, manifest: Manifest) -> str:
    """The hash of a part from which nothing was left out, of a source of files that were stored as they are."""
    items = []
    try:
        for key, members in contents.members.items():
            about = json.loads(contents.about[key]["json"])
            (image,) = (member for member in members if member.extension in IMAGE_EXTENSIONS)
            items.append(Item(about["filename"], about["label"], image.size, key, None))
        options = Options(**{name: manifest.plan[name] for name in Options.__dataclass_fields__})
        return ShardPlan(0, tuple(items), options).sha256
    except (ValueError, TypeError, KeyError):
        return ""


def _claims(folder: Path, manifest: Manifest) -> Iterator[bytes]:
    options = {name: value for name, value in manifest.plan.items() if name != "sha256"}
    yield claim_text(manifest.plan["sha256"], manifest.source["images"], options)


def _infos(folder: Path, manifest: Manifest) -> Iterator[bytes]:
    yield timm_info(manifest.split, {record.file("tar"): record.samples for record in manifest.shards})


def _quarantines(folder: Path, manifest: Manifest) -> Iterator[bytes]:
    """From the indexes; a shard of which nothing was kept has none, then this is not proved."""
    rejected: list[Rejection] = []
    for record in manifest.shards:
        with suppress(OSError, DataError):
            file = folder / record.file("npz")
            rejected += parse_index(file.read_bytes(), file).rejected
    yield quarantine_text(rejected)
