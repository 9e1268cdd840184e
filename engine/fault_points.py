"""Faults on purpose: named points of a run at which the environment variable MASKWRIGHT_FAULT lets something fail.

    MASKWRIGHT_FAULT="POINT:ACTION[@N][#RANK][;...]"      for example  save.manifest:kill@2#1

ACTION happens the N-th time (default: the first) that RANK (default: every rank) reaches POINT: `kill` (SIGKILL),
`stop` (SIGSTOP), `term` (SIGTERM), `exit` (code 7 without clean-up), `leave` (code 0), `raise` (RuntimeError), `enospc`
(OSError), `sleep` (an hour), `nan` (the caller spoils its numbers). For tests; without the variable nothing happens.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass

VARIABLE = "MASKWRIGHT_FAULT"
POINTS = (
    "start.joined",  # the ranks have found each other
    "start.agreed",  # and mean the same run
    "resume.verified",
    "resume.converted",  # the universal form for another number of ranks is there
    "resume.loaded",
    "step.begin",
    "step.loss",  # after the forward pass of a micro-step (nan)
    "step.backward",  # before the backward pass (nan: the gradient alone)
    "step.gradient",  # after the backward pass of a micro-step
    "step.update",  # all micro-steps done, weights as before
    "step.done",
    "evaluate.begin",
    "save.begin",
    "save.write",  # about to write one of DeepSpeed's files of this rank
    "save.state",  # DeepSpeed's files of this rank are written
    "save.weights",  # rank 0 has written the exported encoder too
    "save.hashed",
    "save.manifest",  # about to write it
    "save.rename",  # about to publish
    "save.published",
    "prune.begin",
    "prune.middle",  # one of those that go is no checkpoint any more
    "log.write",
    "finish",
)
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
EXITS = {"exit": 7, "leave": 0}
ACTIONS = (*SIGNALS, *EXITS, "raise", "enospc", "sleep", "nan")
HOUR = 3600.0  # seconds


@dataclass(frozen=True)
class Fault:
    """What is to happen at one point, the `number`-th time that `rank` (None: any) comes by."""

    point: str
    action: str
    number: int = 1
    rank: int | None = None


def parse_faults(text: str) -> tuple[Fault, ...]:
    """The faults of MASKWRIGHT_FAULT; ValueError naming the part that is none."""
    return tuple(parse_fault(part.strip()) for part in text.split(";") if part.strip())


def parse_fault(text: str) -> Fault:
    match = re.fullmatch(r"([a-z.]+):([a-z]+)(?:@(\d+))?(?:#(\d+))?", text)
    if not match or match[1] not in POINTS or match[2] not in ACTIONS:
        raise ValueError(
            f"{VARIABLE}={text}: POINT:ACTION[@N][#RANK] is needed; points: {', '.join(POINTS)}; "
            f"actions: {', '.join(ACTIONS)}"
        )
    rank = None if match[4] is None else int(match[4])
    return Fault(match[1], match[2], int(match[3] or 1), rank)


_visits: Counter[str] = Counter()


def reached(point: str) -> bool:
    """This rank is at `point`. True: the caller is to spoil its numbers (`nan`); other faults happen in here."""
    if VARIABLE not in os.environ:
        return False
    _visits[point] += 1
    faults, rank = parse_faults(os.environ[VARIABLE]), int(os.environ.get("RANK", "0"))
    due = [f for f in faults if (f.point, f.number) == (point, _visits[point]) and f.rank in (None, rank)]
    for fault in due:
        if fault.action != "nan":
            fail(fault)
    return any(fault.action == "nan" for fault in due)


def fail(fault: Fault) -> None:
    """Let it happen."""
    if fault.action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[fault.action])
    elif fault.action in EXITS:
        os._exit(EXITS[fault.action])
    elif fault.action == "raise":
        raise RuntimeError(f"{VARIABLE}: {fault.point}")
    elif fault.action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), fault.point)
    else:
        time.sleep(HOUR)
