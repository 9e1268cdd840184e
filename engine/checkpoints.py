"""Checkpoints that are complete or absent.

DeepSpeed publishes its `latest` before the other ranks have written and checks nothing when it loads. So a
checkpoint is written into a temporary folder of unique name, every file is flushed and hashed, the manifest comes last,
and one rename publishes it: a folder `step_*` with a `manifest.json` is complete, anything else is not a checkpoint.
Before a checkpoint is loaded, every hash is checked; a broken one is reported and set aside, the one before is used.

DeepSpeed's files are pickles: resume only from folders that you trust.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from engine.runtime import Runtime

FORMAT = "maskwright-checkpoint/1"
MANIFEST = "manifest.json"
CHUNK = 1 << 22  # bytes
TEMPORARY, REPLACED, BROKEN = ".tmp-", ".replaced-", "broken-"  # folders that are no checkpoints


class CheckpointError(ValueError):
    """A checkpoint that is missing, broken, or of another run."""


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def complete_checkpoints(root: Path) -> list[Path]:
    """Folders that hold a manifest, newest step first."""
    return sorted((path.parent for path in root.glob(f"step_*/{MANIFEST}")), reverse=True)


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
    final = root / folder_name(step)
    temporary = root / f"{TEMPORARY}{final.name}-{shared(uuid.uuid4().hex[:8], runtime)}"
    model_engine.save_checkpoint(str(root), tag=temporary.name, save_latest=False)
    if runtime.is_main:
        write_more(temporary)
    barrier(runtime)
    files = hash_files(temporary, runtime)
    if runtime.is_main:
        publish(temporary, final, {"format": FORMAT, "step": step, **facts, "files": files})
    barrier(runtime)
    return final


def publish(temporary: Path, final: Path, manifest: dict) -> None:
    """Manifest last, then one rename; everything flushed to the disk in that order.

    A folder of the same step is there only if the run went back before it, because it was broken: it is replaced.
    """
    with open(temporary / MANIFEST, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(temporary)
    set_aside(final, REPLACED)
    os.replace(temporary, final)
    sync_folder(final.parent)


def set_aside(folder: Path, prefix: str) -> None:
    """Rename a folder so that it is no checkpoint any more; nothing happens where there is none."""
    if folder.exists():
        os.replace(folder, folder.with_name(f"{prefix}{folder.name}-{uuid.uuid4().hex[:8]}"))


def prune(root: Path, keep: int, runtime: Runtime) -> None:
    """Delete complete checkpoints beyond the newest `keep`, and what killed saves left behind."""
    if runtime.is_main:
        leftovers = (*root.glob(f"{TEMPORARY}*"), *root.glob(f"{REPLACED}*"))
        for folder in (*complete_checkpoints(root)[keep:], *leftovers):
            shutil.rmtree(folder, ignore_errors=True)
    barrier(runtime)


def hash_files(folder: Path, runtime: Runtime) -> dict[str, dict]:
    """Size and sha256 of every file below `folder`, the work shared by the ranks; each file is flushed first."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    names = [name for name in names if name != MANIFEST]
    mine = {name: hash_file(folder / name) for name in names[runtime.rank :: runtime.world_size]}
    if runtime.world_size == 1:
        return mine
    parts: list[dict] = [{}] * runtime.world_size
    dist.all_gather_object(parts, mine)
    return {name: record for part in parts for name, record in part.items()}


def hash_file(path: Path) -> dict:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


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


def load(folder: Path, model_engine) -> None:
    """Put a verified checkpoint into the engine. Collective."""
    path, _ = model_engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise CheckpointError(f"{folder}: DeepSpeed found no checkpoint in it")


def check_same_run(
    manifest: dict,
    facts: dict,
    *,
    harmless: Callable[[str], bool],
    structural: Callable[[str], bool],
    allow_changes: bool,
) -> None:
    """CheckpointError with a diff where a checkpoint is of another data set, rank count or recipe.

    Which recipe fields may differ says `harmless`; `allow_changes` lets others pass too, but never those that are
    `structural`: the saved tensors would not fit.
    """
    saved, present = manifest["recipe"], facts["recipe"]
    changed = [key for key in saved | present if saved.get(key) != present.get(key) and not harmless(key)]
    diff = [f"{key}: {saved.get(key)} -> {present.get(key)}" for key in changed]
    was, now = manifest.get("objective", {}), facts["objective"]
    diff += [f"{key}: {was.get(key)} -> {now.get(key)}" for key in was | now if was.get(key) != now.get(key)]
    if manifest["dataset"] != facts["dataset"]:
        diff.append(f"data set: {manifest['dataset'][:12]} -> {facts['dataset'][:12]}")
    unfit = [line for key, line in zip(changed, diff, strict=False) if structural(key)]
    if unfit:
        raise CheckpointError(
            f"--resume: the checkpoint of step {manifest['step']} holds other tensors ({'; '.join(unfit)}); "
            "undo the change, or start afresh in another run.out"
        )
    if diff and not allow_changes:
        raise CheckpointError(
            f"--resume: the checkpoint of step {manifest['step']} is of another run ({'; '.join(diff)}); "
            "undo the change, or add --allow-changes to go on all the same"
        )
    if manifest["world_size"] != facts["world_size"]:
        raise CheckpointError(
            f"--resume: saved by {manifest['world_size']} ranks, resumed by {facts['world_size']}; "
            f"start {manifest['world_size']} ranks"
        )


def shared(value, runtime: Runtime):
    """Rank 0's value on every rank."""
    if runtime.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier(runtime: Runtime) -> None:
    if runtime.world_size > 1:
        dist.barrier()


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
