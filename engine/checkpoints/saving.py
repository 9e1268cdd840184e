"""Write a checkpoint so that it is complete or absent.

DeepSpeed publishes its `latest` before the other ranks have written and checks nothing when it loads. So a
checkpoint is written into a temporary folder of unique name, every file is flushed and hashed, the manifest comes last,
and one rename publishes it.

DeepSpeed's files are pickles: resume only from folders that you trust.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from engine.agreement import barrier, shared
from engine.checkpoints.folders import (
    FORMAT,
    MANIFEST,
    REPLACED,
    TEMPORARY,
    complete_checkpoints,
    folder_name,
    set_aside,
    sync_folder,
)
from engine.checkpoints.hashing import hash_files
from engine.fault_points import reached
from engine.runtime import Runtime


def save(
    root: Path,
    model_engine,
    runtime: Runtime,
    *,
    step: int,
    facts: dict,
    write_more: Callable[[Path], None],
) -> Path:
    """Write checkpoint `step` under `root` and return its folder. Collective.

    `facts` (JSON) goes into the manifest: what the run is, to be compared at a resume. `write_more(folder)` is called
    on rank 0 to add files, for example the exported encoder.
    """
    reached("save.begin")
    final = root / folder_name(step)
    temporary = root / f"{TEMPORARY}{final.name}-{shared(uuid.uuid4().hex[:8], runtime)}"
    model_engine.save_checkpoint(str(root), tag=temporary.name, save_latest=False)
    reached("save.state")
    if runtime.is_main:
        write_more(temporary)
        reached("save.weights")
    barrier(runtime)
    files = hash_files(temporary, runtime)
    reached("save.hashed")
    if runtime.is_main:
        publish(temporary, final, {"format": FORMAT, "step": step, **facts, "files": files})
    barrier(runtime)
    reached("save.published")
    return final


def publish(temporary: Path, final: Path, manifest: dict) -> None:
    """Manifest last, then one rename; everything flushed to the disk in that order.

    A folder of the same step is there only if the run went back before it, because it was broken: it is replaced.
    """
    reached("save.manifest")
    with open(temporary / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(temporary)
    set_aside(final, REPLACED)
    reached("save.rename")
    os.replace(temporary, final)
    sync_folder(final.parent)


def prune(root: Path, keep: int, runtime: Runtime) -> None:
    """Delete complete checkpoints beyond the newest `keep`, and what killed saves left behind."""
    if runtime.is_main:
        leftovers = (*root.glob(f"{TEMPORARY}*"), *root.glob(f"{REPLACED}*"))
        reached("prune.begin")
        for folder in (*complete_checkpoints(root)[keep:], *leftovers):
            shutil.rmtree(folder, ignore_errors=True)
            reached("prune.middle")
    barrier(runtime)
