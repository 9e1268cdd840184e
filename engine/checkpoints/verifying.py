"""Is a checkpoint what its manifest promises? Asked before anything of it is loaded, and before an older one goes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from engine.agreement import gathered, shared, together_on_main
from engine.checkpoints.finite import file_problem
from engine.checkpoints.folders import BROKEN, CheckpointError, broken_checkpoints, set_aside, step_folders
from engine.checkpoints.hashing import hash_file
from engine.checkpoints.manifests import read_manifest
from engine.runtime import Runtime


def newest_intact(root: Path, runtime: Runtime, warn: Callable[[str], None]) -> tuple[Path, dict]:
    """Newest checkpoint whose files all have their hashes and finite numbers, with its manifest. Collective.

    `warn` is told of every broken checkpoint; it is renamed, so that nothing counts on it any more. CheckpointError if
    none is intact.
    """
    for folder in together_on_main(lambda: step_folders(root), runtime):
        manifest, problem = shared(manifest_of(folder) if runtime.is_main else None, runtime)
        problem = problem or damage(folder, manifest, runtime)
        if problem is None:
            return folder, manifest
        warn(f"{folder}: {problem}; it is set aside as {BROKEN}*, trying the checkpoint before it")
        together_on_main(lambda folder=folder: set_aside(folder, BROKEN), runtime)
    broken = together_on_main(lambda: len(broken_checkpoints(root)), runtime)
    found = f"{broken} checkpoints, all broken ({BROKEN}*)" if broken else "no complete checkpoint"
    raise CheckpointError(f"--resume: {root}: {found}; start without --resume in a new run.out")


def manifest_of(folder: Path) -> tuple[dict | None, str | None]:
    """The manifest of a training's checkpoint, or what is wrong with it."""
    try:
        return read_manifest(folder, resumable=True), None
    except CheckpointError as error:
        return None, str(error)


def damage(folder: Path, manifest: dict, runtime: Runtime, *, opened: bool = True) -> str | None:
    """What is wrong with a checkpoint's files, or None; the work is shared by the ranks. Collective.

    Sizes and hashes are of what the disk holds. `opened`: the tensors are looked at too.
    """
    names = sorted(manifest["files"])
    mine = names[runtime.rank :: runtime.world_size]
    problems = (file_damage(folder / name, manifest["files"][name], opened=opened) for name in mine)
    found = ((name, problem) for name, problem in zip(mine, problems, strict=True) if problem)
    problems_of_all = [part for part in gathered(next(found, None), runtime) if part]
    return ": ".join(min(problems_of_all)) if problems_of_all else None


def file_damage(path: Path, promised: dict, *, opened: bool) -> str | None:
    """What is wrong with one file, or None."""
    if not path.is_file():
        return "is missing"
    try:
        size = path.stat().st_size
        if size != promised["bytes"]:
            return f"{size:,} bytes, the manifest has {promised['bytes']:,}"
        if hash_file(path, from_disk=True) != promised:
            return f"{size:,} bytes do not have the manifest's hash"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return file_problem(path) if opened else None
