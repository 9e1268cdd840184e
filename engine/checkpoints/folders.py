"""What a folder of checkpoints looks like: names, and what is no checkpoint.

A folder `step_*` with a `manifest.json` is a complete checkpoint; anything else beside it is not one.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

FORMAT = "maskwright-checkpoint/1"
MANIFEST = "manifest.json"
NAME = re.compile(r"step_(\d{8,})")  # and nothing after it: a copy that a user made is not ours to count or delete
TEMPORARY, REPLACED, BROKEN = ".tmp-", ".replaced-", "broken-"  # folders that are no checkpoints


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken, or of another run."""


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def step_folders(root: Path) -> list[Path]:
    """Folders named as checkpoints, newest step first; none where there is no `root`.

    OSError where it cannot be listed: whoever takes that for an empty folder begins at step 0 by accident.
    """
    try:
        names = [name for name in os.listdir(root) if NAME.fullmatch(name)]
    except FileNotFoundError:
        return []
    return [root / name for name in sorted(names, key=lambda name: int(NAME.fullmatch(name)[1]), reverse=True)]


def complete_checkpoints(root: Path) -> list[Path]:
    """Folders that hold a manifest, newest step first; OSError as `step_folders`."""
    return [folder for folder in step_folders(root) if (folder / MANIFEST).is_file()]


def broken_checkpoints(root: Path) -> list[Path]:
    """Folders that lack their manifest, or were set aside because something was wrong with them."""
    complete = complete_checkpoints(root)
    return [*(folder for folder in step_folders(root) if folder not in complete), *sorted(root.glob(f"{BROKEN}*"))]


def set_aside(folder: Path, prefix: str) -> None:
    """Rename a folder so that it is no checkpoint any more; nothing happens where there is none."""
    if folder.exists():
        os.replace(folder, folder.with_name(f"{prefix}{folder.name}-{uuid.uuid4().hex[:8]}"))


def sweep(root: Path) -> None:
    """Delete what a killed save or a killed resume left behind. Only whoever holds the run's lock may."""
    for folder in (*root.glob(f"{TEMPORARY}*"), *root.glob(f"{REPLACED}*")):
        shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
