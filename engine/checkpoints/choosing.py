"""Where a run begins: at step 0, or after the newest intact checkpoint. Never at 0 by accident.

Chosen and verified before DeepSpeed's engine exists: a failed load would leave it half loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.agreement import together_on_main
from engine.checkpoints.comparing import check_same_run, other_circumstances
from engine.checkpoints.folders import broken_checkpoints, complete_checkpoints, sweep
from engine.checkpoints.verifying import newest_intact
from engine.command_line import Command
from engine.fault_points import reached
from engine.plan import Plan
from engine.runtime import Runtime
from engine.start_up import is_structural, may_differ, other_images_at_once


@dataclass(frozen=True)
class Chosen:
    """A checkpoint to go on from: intact, of this run, not beyond its end."""

    folder: Path
    manifest: dict
    notes: list[str]  # lines on what is other than it was

    @property
    def step(self) -> int:
        """Optimizer steps that are done."""
        return self.manifest["step"]


def choose(
    command: Command, plan: Plan, root: Path, facts: dict, runtime: Runtime, warn: Callable[[str], None] = print
) -> Chosen | None:
    """The checkpoint in `root` that `--resume` asks for; None: begin at step 0. Collective.

    `facts` are those of the run as it is now; `warn` is told, on every rank, of checkpoints that are broken. ValueError
    where there are checkpoints and `--resume` is not given, where there is none that is intact, or where the newest is
    of another run or beyond this one's end. RankFailure (an OSError) where `root` cannot be read.
    """
    resume = command.resume
    complete, broken = together_on_main(lambda: (complete_checkpoints(root), broken_checkpoints(root)), runtime)
    if resume is None and complete:
        raise ValueError(
            f"run.out={root.parent}: holds checkpoints up to {complete[0].name}; add --resume to go on, "
            "or choose another run.out"
        )
    if resume is None and broken:
        raise ValueError(f"run.out={root.parent}: holds {len(broken)} broken checkpoints; choose another run.out")
    if resume is None or (resume == "auto" and not complete and not broken):
        return None
    together_on_main(lambda: sweep(root), runtime)
    folder, manifest = newest_intact(root, runtime, warn)
    reached("resume.verified")
    check_same_run(manifest, facts, harmless=may_differ, structural=is_structural, allow_changes=command.allow_changes)
    if manifest["step"] > plan.last_step:
        raise ValueError(
            f"--resume: {folder.name} lies beyond the last step {plan.last_step}; "
            "raise run.steps or run.stop_after, or choose another run.out"
        )
    notes = other_circumstances(manifest, facts)
    return Chosen(folder, manifest, notes + other_images_at_once(manifest, command.recipe, runtime.world_size))
