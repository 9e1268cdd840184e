"""A script for launchers: several trainings one after the other in the same ranks, which saves their start-up.

Usage: rank_worker.py FOLDER NAME=OVERRIDE,OVERRIDE ... -- OVERRIDES OF ALL; run NAME goes to FOLDER/NAME.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.command_line import Command, parse_command
from engine.runtime import start, stop
from engine.train import train


def arguments() -> tuple[str, list[str], list[str]]:
    """Folder, runs, and the arguments that all runs share."""
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    split = given.index("--")
    folder, *runs = given[:split]
    return folder, runs, given[split + 1 :]


def command(folder: str, name: str, own: str, common: list[str]) -> Command:
    """Run `name` with overrides of its own, separated by commas."""
    overrides = [override for override in own.split(",") if override]
    return parse_command([*common, f"run.out={folder}/{name}", *overrides])


def main() -> None:
    folder, runs, common = arguments()
    runtime = start(timeout=300)
    for run in runs:
        name, _, own = run.partition("=")
        train(command(folder, name, own, common), runtime).model_engine.destroy()
    stop()


if __name__ == "__main__":
    main()
