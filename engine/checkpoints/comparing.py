"""Is a checkpoint of the run that would go on from it, and what will be other than it was?"""

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
    """CheckpointError with a diff where a checkpoint is of another data set or recipe.

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


def compiled(record: dict) -> str:
    """What recipe.compile came to, off or blocks; a checkpoint from before there was a choice was not compiled."""
    choice = record["recipe"].get("compile", "off")
    if choice != "auto":
        return choice
    return "off" if record.get("hardware", "").startswith("cpu") else "blocks"


def other_circumstances(manifest: dict, facts: dict) -> list[str]:
    """Lines on what keeps a resumed run from having the same bits: ranks, micro-batch, versions, hardware."""
    lines = []
    was, now = manifest["world_size"], facts["world_size"]
    if was != now:
        lines.append(f"elastic     saved by {was} rank{'s' * (was > 1)}, now {now}: equal to rounding, not bitwise")
    micro_was, micro_now = (record["recipe"].get("optim.micro_batch") for record in (manifest, facts))
    if micro_was != micro_now and was == now:
        lines.append(f"elastic     saved with micro-batch {micro_was}, now {micro_now}: equal to rounding, not bitwise")
    compile_was, compile_now = compiled(manifest), compiled(facts)
    if compile_was != compile_now:
        lines.append(f"compile     was {compile_was}, now {compile_now}: equal to rounding, not bitwise")
    versions = (manifest.get("versions", {}), facts["versions"])
    other = [
        f"{name} {versions[0].get(name)} -> {version}"
        for name, version in versions[1].items()
        if name in versions[0] and versions[0][name] != version
    ]
    if manifest.get("hardware", facts["hardware"]) != facts["hardware"]:
        other.append(f"{manifest['hardware']} -> {facts['hardware']}")
    return [*lines, *([f"WARNING     {', '.join(other)}: losses will not be bitwise those of before"] if other else [])]
