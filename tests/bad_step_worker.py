"""A script for launchers: trainings that meet a step without a finite loss or gradient, or that leave that step out.

Usage: bad_step_worker.py FOLDER NAME:FAULT:OVERRIDE,OVERRIDE ... -- OVERRIDES OF ALL. FAULT is the POINT=ACTION@N#RANK
of MASKWRIGHT_FAULT with `=` in the place of `:`, empty for none, or `skip=STEP`: the batches of that step (from 1) are
taken, and nothing else happens in it.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import fault_points
from engine.runtime import start, stop
from engine.train import Trainer, train
from tests.rank_worker import arguments, command

UPDATE = Trainer.optimizer_step


def leaving_out(skipped: int):
    """An `optimizer_step` that does nothing in step `skipped`."""

    def optimizer_step(self: Trainer, step: int, *, measure: bool) -> dict[str, float]:
        if step + 1 != skipped:
            return UPDATE(self, step, measure=measure)
        for _ in range(self.plan.accumulation):
            self.loader.next_batch()
        self.stopping.ask()
        return {"loss": math.nan, "grad_norm": math.nan}

    return optimizer_step


def prepare(fault: str) -> None:
    """The next run meets `fault`, and only that."""
    fault_points._visits.clear()  # they are those of a process, and this one runs several trainings
    os.environ[fault_points.VARIABLE] = "" if fault.startswith("skip") else fault.replace("=", ":")
    Trainer.optimizer_step = leaving_out(int(fault.partition("=")[2])) if fault.startswith("skip") else UPDATE


def main() -> None:
    folder, runs, common = arguments()
    runtime = start(timeout=300)
    for run in runs:
        name, fault, own = run.split(":")
        prepare(fault)
        train(command(folder, name, own, common), runtime).model_engine.destroy()
    stop()


if __name__ == "__main__":
    main()
