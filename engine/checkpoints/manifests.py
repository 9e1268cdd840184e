"""What a checkpoint says of itself: written last, read strictly.

`manifest.json` names every file of the checkpoint with its size and sha256, the step, and the run that wrote it. A
folder is a checkpoint if and only if it is there. Nothing that it says is believed before it has been checked: it may
have been cut, edited, or written by another version.
"""

from __future__ import annotations

import json
import os
import platform
import re
from pathlib import Path, PurePosixPath
from typing import NoReturn

import torch

from engine.checkpoints.folders import FORMAT, MANIFEST, CheckpointError, sync_folder
from engine.runtime import Runtime, import_deepspeed

HASH = re.compile(r"[0-9a-f]{64}")
RESUMABLE = {"world_size": int, "dataset": str, "objective": dict}  # what a training writes beside
ALWAYS = {"format": str, "step": int, "name": str, "recipe": dict, "files": dict}


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write `folder`'s manifest and flush it, then the folder, to the disk."""
    with open(folder / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read_manifest(folder: Path, *, resumable: bool = False) -> dict:
    """The manifest of a checkpoint folder, with `resumable` of one that a training wrote.

    CheckpointError (a ValueError) says what is wrong with it: absent, cut, doubled keys, another format, negative
    numbers, a hash that is none, a file name that leads out of the folder.
    """
    try:
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text, object_pairs_hook=without_doubles, parse_constant=refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"unreadable {MANIFEST} ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise CheckpointError(f"{MANIFEST}: its format is {found}, not {FORMAT}")
    for key, kind in (ALWAYS | (RESUMABLE if resumable else {})).items():
        if type(manifest.get(key)) is not kind:
            raise CheckpointError(f"{MANIFEST}: {key} is {manifest.get(key)!r:.60}, not of type {kind.__name__}")
    for key, least in (("step", 0), ("world_size", 1)):
        if type(manifest.get(key, least)) is not int or manifest.get(key, least) < least:
            raise CheckpointError(f"{MANIFEST}: {key} is {manifest[key]!r:.60}; a whole number from {least} is needed")
    for name, record in manifest["files"].items():
        check_file(name, record)
    return manifest


def without_doubles(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError where a key stands twice, of which JSON readers silently take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def check_file(name: str, record: object) -> None:
    """CheckpointError where a file's entry is none, or its name leads out of the folder."""
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name:
        raise CheckpointError(f"{MANIFEST}: {name!r:.80} is no name of a file in the folder")
    if not isinstance(record, dict) or record.keys() != {"bytes", "sha256"}:
        raise CheckpointError(f"{MANIFEST}: {name}: bytes and sha256 are needed")
    size, digest = record["bytes"], record["sha256"]
    if type(size) is not int or size < 0 or not isinstance(digest, str) or not HASH.fullmatch(digest):
        raise CheckpointError(f"{MANIFEST}: {name}: {size!r:.40} bytes and sha256 {digest!r:.80} cannot be")


def total_bytes(manifest: dict) -> int:
    """Size of all files of a checkpoint."""
    return sum(record["bytes"] for record in manifest["files"].values())


def written_with(runtime: Runtime) -> dict:
    """What bits depend on beside recipe and data: ranks, versions, kind of hardware."""
    device = runtime.device
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "world_size": runtime.world_size,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": import_deepspeed().__version__,
        },
        "hardware": f"{card}, {platform.machine()}",
    }
