"""A script for launchers: several trainings one after the other in the same ranks, which saves their start-up.

Usage: rank_worker.py FOLDER NAME=OVERRIDE,OVERRIDE ... -- OVERRIDES OF ALL; run NAME goes to FOLDER/NAME.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.command_line import parse_command
from engine.runtime import start, stop
from engine.train import train


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    split = arguments.index("--")
    folder, *runs = arguments[:split]
    runtime = start(timeout=300)
    for run in runs:
        name, _, own = run.partition("=")
        overrides = [override for override in own.split(",") if override]
        command = parse_command([*arguments[split + 1 :], f"run.out={folder}/{name}", *overrides])
        train(command, runtime).model_engine.destroy()
    stop()


if __name__ == "__main__":
    main()
