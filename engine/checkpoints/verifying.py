"""Is a checkpoint what its manifest promises? Asked before anything of it is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from engine.agreement import barrier, shared
from engine.checkpoints.folders import BROKEN, MANIFEST, CheckpointError, complete_checkpoints, set_aside
from engine.checkpoints.hashing import hash_files
from engine.runtime import Runtime


def newest_intact(root: Path, runtime: Runtime, warn: Callable[[str], None]) -> tuple[Path, dict]:
    """Newest checkpoint whose files all have their hashes, with its manifest; CheckpointError if there is none.

    Collective. `warn` is told of every broken checkpoint; it is renamed, so that nothing counts on it any more.
    """
    folders = shared([str(folder) for folder in complete_checkpoints(root)], runtime)
    for folder in map(Path, folders):
        problem = damage(folder, runtime)
        if problem is None:
            return folder, json.loads((folder / MANIFEST).read_text())
        warn(f"{folder}: {problem}; it is set aside as {BROKEN}*, trying the checkpoint before it")
        if runtime.is_main:
            set_aside(folder, BROKEN)
        barrier(runtime)
    found = f"{len(folders)} checkpoints, all broken" if folders else "no complete checkpoint"
    raise CheckpointError(f"--resume: {root}: {found}; start without --resume in a new run.out")


def damage(folder: Path, runtime: Runtime) -> str | None:
    """What is wrong with a checkpoint's files, or None. Collective."""
    try:
        promised = json.loads((folder / MANIFEST).read_text())["files"]
    except (ValueError, KeyError, OSError) as error:
        return f"unreadable {MANIFEST} ({error})"
    found = hash_files(folder, runtime)
    for name, record in promised.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != record:
            return f"{name}: {found[name]['bytes']} bytes do not have the manifest's size or hash"
    return None
