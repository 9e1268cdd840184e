"""A script for launchers: runs that are broken off at a fault point and resumed, in the same ranks one after the other.

Usage: resume_worker.py FOLDER PLAN.json; PLAN is a list of [arguments of engine/train.py, MASKWRIGHT_FAULT or ""].
A run with a fault must end by it, one without must not.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import fault_points, shell

shell.calm_threads()  # before torch: on a busy machine the tests take half as long

from engine.command_line import parse_command
from engine.runtime import start, stop
from engine.train import train


def main() -> None:
    folder, plan = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    runtime = start(timeout=300)
    for name, arguments, fault in json.loads(Path(plan).read_text()):
        os.environ[fault_points.VARIABLE] = fault
        fault_points._visits.clear()  # of the run before
        ended = ""
        try:
            train(parse_command([*arguments, f"run.out={folder}/{name}"]), runtime).model_engine.destroy()
        except RuntimeError as error:
            ended = str(error)
        if bool(ended) != bool(fault) or fault_points.VARIABLE not in ended and fault:
            raise SystemExit(f"{name} with {fault!r} ended with {ended!r}")
    stop()


if __name__ == "__main__":
    main()
