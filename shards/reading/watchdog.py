"""A wait that takes too long ends the process: one line that says what was waited for, and the stacks of all threads.

A thread of Python's watches. Should a library wait without letting go of the interpreter, that thread cannot run:
then a thread of faulthandler's, which needs no interpreter, writes the stacks a little later and ends the process.
The one who waits cannot be interrupted (it is inside DALI, or DALI inside the kernel), so nothing is raised.
"""

from __future__ import annotations

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, Self

EXIT_CODE = 1
GRACE = 5.0  # seconds that Python's thread has for its line before faulthandler ends the process
_STDERR = 2  # the file descriptor: sys.stderr may be a progress bar's, and its lock may be held
_GLANCES = 8  # per patience


class Watchdog:
    """`with watchdog:` around every wait. One wait at a time in a process, as faulthandler has one timer."""

    def __init__(self, patience: float, what: Callable[[], str]) -> None:
        """`patience` in seconds, 0: for ever. `what` is asked for the line when a wait has lasted too long."""
        self._patience, self._what = patience, what
        self._since: float | None = None  # when the present wait began
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="maskwright-watchdog", daemon=True)
        if patience:
            self._thread.start()

    def __enter__(self) -> Self:
        if self._patience and not self._closed.is_set():
            self._since = time.monotonic()
            faulthandler.dump_traceback_later(self._patience + GRACE, exit=True, file=_STDERR)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._since is not None:
            faulthandler.cancel_dump_traceback_later()
            self._since = None

    def close(self) -> None:
        """End the thread. Harmless when repeated; waits are not watched any more."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(self._patience / _GLANCES):
            since = self._since
            if since is not None and time.monotonic() - since >= self._patience:
                self._end()

    def _end(self) -> NoReturn:
        try:
            line = self._what()
        except Exception as error:  # whatever it is, the process must end and the stacks be seen
            line = f"what was waited for cannot be told: {error}"
        os.write(_STDERR, f"\nerror: {line}\n".encode("utf-8", "backslashreplace"))
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        os._exit(EXIT_CODE)
