"""Write a checkpoint so that it is complete or absent.

DeepSpeed publishes its `latest` before the other ranks have written and checks nothing when it loads. So a
checkpoint is written into a temporary folder of unique name, every file is flushed and hashed, the manifest comes last,
and one rename publishes it. What fails on one rank fails on all, and leaves nothing behind.

DeepSpeed's files are pickles: resume only from folders that you trust.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.agreement import RankFailure, barrier, shared, together, together_on_main
from engine.checkpoints.folders import FORMAT, REPLACED, TEMPORARY, folder_name, set_aside, sync_folder
from engine.checkpoints.hashing import hash_files
from engine.checkpoints.manifests import total_bytes, write_manifest
from engine.checkpoints.writing import remembering
from engine.fault_points import reached
from engine.runtime import Runtime


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was published."""

    folder: Path
    manifest: dict

    @property
    def num_bytes(self) -> int:
        return total_bytes(self.manifest)


def save(
    root: Path,
    model_engine,
    runtime: Runtime,
    *,
    step: int,
    facts: dict,
    write_more: Callable[[Path], None],
) -> Saved:
    """Write checkpoint `step` under `root`. Collective.

    `facts` (JSON) goes into the manifest: what the run is, to be compared at a resume. `write_more(folder)` is called
    on rank 0 to add files, for example the exported encoder. RankFailure (an OSError) on all ranks where any could not
    write: then nothing has changed.
    """
    reached("save.begin")
    final = root / folder_name(step)
    temporary = root / f"{TEMPORARY}{final.name}-{shared(uuid.uuid4().hex[:8], runtime)}"
    try:
        manifest = {
            "format": FORMAT,
            "step": step,
            **facts,
            "files": write_files(temporary, model_engine, runtime, write_more),
        }
        together_on_main(lambda: publish(temporary, final, manifest), runtime)
    except RankFailure:
        if runtime.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        barrier(runtime)
        raise
    reached("save.published")
    return Saved(final, manifest)


def write_files(folder: Path, model_engine, runtime: Runtime, write_more: Callable[[Path], None]) -> dict[str, dict]:
    """All files of a checkpoint but its manifest; their sizes and hashes. Collective, RankFailure as `save`."""
    with remembering(model_engine) as writer:
        model_engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False)
    reached("save.state")
    together(writer.answer, runtime)

    def write_rest() -> None:
        write_more(folder)
        reached("save.weights")

    together_on_main(write_rest, runtime)
    files = hash_files(folder, runtime)
    reached("save.hashed")
    return files


def publish(temporary: Path, final: Path, manifest: dict) -> None:
    """Manifest last, then one rename; everything flushed to the disk in that order.

    A folder of the same step is there only if the run went back before it, because it was broken: it is replaced.
    """
    reached("save.manifest")
    write_manifest(temporary, manifest)
    set_aside(final, REPLACED)
    reached("save.rename")
    os.replace(temporary, final)
    sync_folder(final.parent)
