"""Where a run begins: at step 0, or after the newest intact checkpoint. Never at 0 by accident."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from engine import checkpoints
from engine.command_line import Command
from engine.export import read_outside
from engine.objectives.contract import Objective
from engine.plan import Plan
from engine.runtime import Runtime
from engine.start_up import is_harmless, is_structural


def resume(
    command: Command, plan: Plan, root: Path, facts: dict, model_engine, objective: Objective, runtime: Runtime
) -> int:
    """Load what `--resume` asks for from the checkpoints in `root`; the number of steps already done. Collective.

    ValueError where there are checkpoints and `--resume` is not given, where there is none that is intact, or where the
    newest is of another run or beyond this one's end.
    """
    found = checkpoints.shared([path.name for path in checkpoints.complete_checkpoints(root)], runtime)
    if command.resume is None and found:
        raise ValueError(
            f"run.out={root.parent}: holds checkpoints up to {found[0]}; add --resume to go on, "
            "or choose another run.out"
        )
    if command.resume is None or (command.resume == "auto" and not found):
        return 0
    warn = partial(print, "warning:", file=sys.stderr) if runtime.is_main else lambda message: None
    folder, manifest = checkpoints.newest_intact(root, runtime, warn)
    checkpoints.check_same_run(
        manifest, facts, harmless=is_harmless, structural=is_structural, allow_changes=command.allow_changes
    )
    if manifest["step"] > plan.last_step:
        raise ValueError(
            f"--resume: {folder.name} lies beyond the last step {plan.last_step}; "
            "raise run.steps or run.stop_after, or choose another run.out"
        )
    checkpoints.load(folder, model_engine)
    read_outside(folder, objective)
    return manifest["step"]
