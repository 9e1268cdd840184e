"""What a rank leaves behind of itself while it trains: its log, its signs of life, and why it ended."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.heartbeats import Heartbeat, describe_loss, end_stopped, lost_others
from engine.logs import FOLDER, RankLog
from engine.runtime import Runtime
from engine.shell import OnThisRank
from engine.signals import REQUESTS
from shards.redaction import redact

SPARE = 10.0  # seconds


class Witness:
    """The log and the heartbeat of one rank."""

    def __init__(self, run_folder: Path, runtime: Runtime, patience: float) -> None:
        """`patience` in seconds is that of a collective. A micro-step has a little more, because a collective that
        fails can say more than one that hangs."""
        self.folder, self.runtime = run_folder / FOLDER, runtime
        self.log = RankLog(self.folder, runtime)
        self.heartbeat = Heartbeat(self.folder, runtime, patience=patience + SPARE, note=self.log.write)
        self.at = self.heartbeat.at
        self.outcome = "done"  # or what else an end without an error is
        REQUESTS.note = self.log.write

    def warn(self, text: str) -> None:
        """Something that all ranks meet alike and that ends nothing: told by the first, kept by each."""
        self.log.write(f"warning: {text}")
        if self.runtime.is_main:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def close(self, ended: str) -> None:
        """The last words; `ended` is empty where there was no error."""
        self.heartbeat.close(redact(ended))
        self.log.close(f"end: {ended or self.outcome}")


@contextmanager
def witnessed(run_folder: Path, runtime: Runtime, patience: float) -> Iterator[Witness]:
    """A witness of what is done inside.

    An error leaves its reason for the other ranks, who look for it when they are left alone; where this rank is left
    alone it raises OnThisRank, naming who went first.
    """
    witness = Witness(run_folder, runtime, patience)
    try:
        yield witness
    except BaseException as error:
        witness.log.error(error)
        if lost_others(error):
            reason = describe_loss(witness.folder, runtime, error)
            witness.close(reason)
            end_stopped(witness.folder, runtime)
            raise OnThisRank(reason) from error
        witness.close(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        raise
    witness.close("")
