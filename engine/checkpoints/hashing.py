"""Size and sha256 of every file of a checkpoint, the work shared by the ranks."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from engine.agreement import gathered
from engine.checkpoints.folders import MANIFEST
from engine.runtime import Runtime

CHUNK = 1 << 22  # bytes


def hash_files(folder: Path, runtime: Runtime) -> dict[str, dict]:
    """Size and sha256 of every file below `folder`, the work shared by the ranks; each file is flushed first."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name != MANIFEST]
    mine = {name: hash_file(folder / name) for name in names[runtime.rank :: runtime.world_size]}
    return {name: record for part in gathered(mine, runtime) for name, record in part.items()}


def hash_file(path: Path) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}
