"""What a folder of checkpoints looks like: names, and what is no checkpoint.

A folder `step_*` with a `manifest.json` is a complete checkpoint; anything else beside it is not one.
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path

FORMAT = "maskwright-checkpoint/1"
MANIFEST = "manifest.json"
TEMPORARY, REPLACED, BROKEN = ".tmp-", ".replaced-", "broken-"  # folders that are no checkpoints


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken, or of another run."""


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def complete_checkpoints(root: Path) -> list[Path]:
    """Folders that hold a manifest, newest step first."""
    return sorted((path.parent for path in root.glob(f"step_*/{MANIFEST}")), reverse=True)


def broken_checkpoints(root: Path) -> list[Path]:
    """Folders that were set aside because something was wrong with them."""
    return sorted(root.glob(f"{BROKEN}*"))


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
