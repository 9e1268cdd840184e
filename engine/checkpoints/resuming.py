"""Where a run begins: at step 0, or after the newest intact checkpoint. Never at 0 by accident."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from engine.agreement import shared
from engine.checkpoints.comparing import check_same_run
from engine.checkpoints.folders import CheckpointError, complete_checkpoints
from engine.checkpoints.verifying import newest_intact
from engine.command_line import Command
from engine.fault_points import reached
from engine.objectives.contract import Objective
from engine.plan import Plan
from engine.runtime import Runtime
from engine.start_up import is_harmless, is_structural
from engine.weights.export import read_outside


def resume(
    command: Command, plan: Plan, root: Path, facts: dict, model_engine, objective: Objective, runtime: Runtime
) -> int:
    """Load what `--resume` asks for from the checkpoints in `root`; the number of steps already done. Collective.

    ValueError where there are checkpoints and `--resume` is not given, where there is none that is intact, or where the
    newest is of another run or beyond this one's end.
    """
    found = shared([path.name for path in complete_checkpoints(root)], runtime)
    if command.resume is None and found:
        raise ValueError(
            f"run.out={root.parent}: holds checkpoints up to {found[0]}; add --resume to go on, "
            "or choose another run.out"
        )
    if command.resume is None or (command.resume == "auto" and not found):
        return 0
    warn = partial(print, "warning:", file=sys.stderr) if runtime.is_main else lambda message: None
    folder, manifest = newest_intact(root, runtime, warn)
    reached("resume.verified")
    check_same_run(manifest, facts, harmless=is_harmless, structural=is_structural, allow_changes=command.allow_changes)
    if manifest["step"] > plan.last_step:
        raise ValueError(
            f"--resume: {folder.name} lies beyond the last step {plan.last_step}; "
            "raise run.steps or run.stop_after, or choose another run.out"
        )
    load(folder, model_engine)
    read_outside(folder, objective)
    reached("resume.loaded")
    return manifest["step"]


def load(folder: Path, model_engine) -> None:
    """Put a verified checkpoint into the engine. Collective."""
    path, _ = model_engine.load_checkpoint(str(folder.parent), tag=folder.name)
    if path is None:
        raise CheckpointError(f"{folder}: DeepSpeed found no checkpoint in it")
