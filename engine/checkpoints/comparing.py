"""Is a checkpoint of the run that would go on from it?"""

from __future__ import annotations

from collections.abc import Callable

from engine.checkpoints.folders import CheckpointError


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
