"""A training whose second rank dies after start-up: the launcher must stop the first and report a failure."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.command_line import parse_command
from engine.train import Trainer, run


def die(*_: object) -> None:
    os._exit(7)


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        Trainer.make_loader = die
    run(parse_command(sys.argv[1:]))
