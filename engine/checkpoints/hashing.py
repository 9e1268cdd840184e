"""Size and sha256 of every file of a checkpoint, the work shared by the ranks."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from engine.agreement import together
from engine.checkpoints.folders import MANIFEST
from engine.runtime import Runtime

CHUNK = 1 << 22  # bytes


def hash_files(folder: Path, runtime: Runtime) -> dict[str, dict]:
    """Size and sha256 of every file below `folder`, the work shared by the ranks; each file is flushed first.

    Collective; RankFailure (an OSError) on all ranks where one cannot read its part.
    """

    def my_part() -> dict[str, dict]:
        names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        names = [name for name in names if name != MANIFEST]
        return {name: hash_file(folder / name) for name in names[runtime.rank :: runtime.world_size]}

    return {name: record for part in together(my_part, runtime) for name, record in part.items()}


def hash_file(path: Path, *, from_disk: bool = False) -> dict:
    """Size and sha256 of a file, flushed first; `from_disk`: what the disk holds, not what memory still has of it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if from_disk:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}
