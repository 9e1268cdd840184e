"""Requests to stop: SIGTERM, SIGINT and SIGUSR1. The first is met at the end of a step (stopping.py), a second at once.

A thread waits for the signals, which are blocked in all the others: so they are heard while the loop is inside a
library, and it is known who sent them. A launcher that passes on what its whole process group has got already, or a
scheduler that sends SIGTERM after SIGUSR1, is not a user who has lost patience: what the launcher sends never counts as
a second signal. Ends without clean-up are harmless: a checkpoint is complete or absent.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from engine.shell import KILLED, STOPPED

HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME = 0.5  # seconds within which a repeated signal is the same request (timeout(1) sends to a child and to its group)
UNKNOWN = -1  # process id of a sender
_STDERR = 2  # the file descriptor: sys.stderr may be a progress bar's, and its lock may be held
_SHOW_CURSOR = "\033[?25h"  # a progress bar hides it


def launcher() -> int | None:
    """Process id of the launcher whose rank this is; None for a plain `python` outside Slurm."""
    return os.getppid() if "LOCAL_RANK" in os.environ or "SLURM_PROCID" in os.environ else None


class Requests:
    """What this process has been asked."""

    def __init__(self) -> None:
        self.first = 0  # the signal that asked for an end; 0: none did
        self.note: Callable[[str], None] = lambda text: None  # told of what is said of signals: this rank's log
        self.launcher: int | None = None  # its process id, where this is a launcher's rank
        self._at = 0.0  # when
        self._starting = True

    def listen(self) -> None:
        """Take the signals over, but those that are ignored (`nohup`, `&` in a script).

        Call it before a library starts threads: what such a thread gets is heard too, but only when the main thread
        is not inside a library, and from an unknown sender. Processes started from here on have the signals blocked.
        """
        self.launcher = launcher()
        heard = [number for number in HEARD if signal.getsignal(number) != signal.SIG_IGN]
        for number in heard:
            signal.signal(number, lambda number, frame: self.receive(number, UNKNOWN))
        signal.pthread_sigmask(signal.SIG_BLOCK, heard)
        threading.Thread(target=self._wait, args=(heard,), name="maskwright-signals", daemon=True).start()

    def keep_until_asked(self) -> None:
        """The first step begins: from now on there is something to save, and the loop asks for `first`."""
        self._starting = False

    def make(self, number: int, reason: str = "") -> None:
        """The first request; before the first step, where nothing would be lost, the process ends here."""
        self.first, self._at = number, time.monotonic()
        name = reason or signal.Signals(number).name
        if self._starting:
            self.say(f"{name}: stopped before the first step; nothing is lost")
            os._exit(STOPPED)
        self.say(f"{name}: stopping at the end of this step, with a checkpoint; a second signal ends at once")

    def receive(self, number: int, sender: int) -> None:
        """A signal from the process `sender` (its id; 0: the kernel, as for Ctrl-C)."""
        if not self.first:
            self.make(number)
        elif sender != self.launcher and time.monotonic() - self._at > SAME:
            self.say(f"{signal.Signals(number).name}: ends at once; the checkpoints are as they were", last=True)
            os._exit(KILLED + number)

    def say(self, text: str, *, last: bool = False) -> None:
        """To the user by the first rank, and to this rank's log."""
        say(text + _SHOW_CURSOR if last and os.isatty(_STDERR) else text)
        self.note(text)

    def _wait(self, heard: list[signal.Signals]) -> None:
        while True:
            told = signal.sigwaitinfo(heard)
            self.receive(told.si_signo, told.si_pid)


REQUESTS = Requests()  # signals come to a process, not to an object in it


def say(text: str) -> None:
    """A line on stderr, by the first rank only; where it cannot be written, the signal is met all the same."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        beside_a_bar = "\n" if os.isatty(_STDERR) else ""
        with suppress(OSError):
            os.write(_STDERR, f"{beside_a_bar}{text}\n".encode())
