"""Bad inputs go through doors of the product in processes that may die, and what becomes of them is counted.

Doors are functions of a program that says `ready`, then reads a JSON line [door, input] and answers with one. That it
ends is a death, that it does not answer in time is a hang; it is started again for the next input.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corpus_entries import KEPT, Entry

DOORS = (sys.executable, str(Path(__file__).with_name("corpus_worker.py")))
START_SECONDS = 180.0  # for the imports


@dataclass(frozen=True)
class Failure:
    """What there is instead of an answer."""

    hung: bool
    detail: str


@dataclass(frozen=True)
class Verdict:
    """What became of an entry. `words`: why it was left out or refused; `wrong`: how what is served differs."""

    accepted: bool
    words: str = ""
    wrong: str = ""


@dataclass
class Counts:
    """The tally; lists name the entries, each with what happened."""

    tried: int = 0
    deaths: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    silently_wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    misnamed: list[str] = field(default_factory=list)  # refused, but not with the words that help
    quarantined: int = 0

    def line(self) -> str:
        """The line that every test of the corpus prints."""
        return (
            f"bad inputs tried {self.tried}, process deaths {len(self.deaths)}, hangs {len(self.hangs)}, silently "
            f"wrong {len(self.silently_wrong)}, samples lost {len(self.lost)}, quarantined as expected "
            f"{self.quarantined}"
        )

    def faults(self) -> list[str]:
        """Everything that must not be, in words."""
        kinds = ("deaths", "hangs", "silently_wrong", "lost", "misnamed")
        return [f"{kind}: {entry}" for kind in kinds for entry in getattr(self, kind)]

    def add(self, entry: Entry, verdict: Verdict | Failure) -> None:
        """Compare what became of an entry with its fate."""
        self.tried += 1
        if isinstance(verdict, Failure):
            self.failed(entry.name, verdict)
        elif verdict.accepted and (entry.fate != KEPT or verdict.wrong):
            self.silently_wrong.append(f"{entry.name}: {verdict.wrong or f'accepted, not {entry.fate}'}")
        elif not verdict.accepted and entry.fate == KEPT:
            self.lost.append(f"{entry.name}: {verdict.words}")
        elif not verdict.accepted and not re.search(entry.fate, verdict.words, re.DOTALL):
            self.misnamed.append(f"{entry.name}: {verdict.words!r}, not {entry.fate!r}")
        elif not verdict.accepted:
            self.quarantined += 1

    def failed(self, name: str, failure: Failure) -> None:
        """An input whose door died or hung."""
        (self.hangs if failure.hung else self.deaths).append(f"{name}: {failure.detail}")


class Doors:
    """The process that answers, started when it is first asked and again where it ended; used in a `with`.

    What it says on stderr goes to the file `errors`.
    """

    def __init__(self, errors: Path, command: Sequence[str] = DOORS) -> None:
        self._errors, self._command = errors, command
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Doors:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def ask(self, door: str, request: Any, seconds: float) -> Any:
        """The answer to [door, request], or a Failure."""
        if self._process is None:
            self._start()
        with suppress(BrokenPipeError):  # it will be seen to have died
            self._process.stdin.write(json.dumps([door, request]).encode() + b"\n")
            self._process.stdin.flush()
        return self._answer(seconds)

    def _start(self) -> None:
        with open(self._errors, "ab") as stream:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, start_new_session=True
            )
        if self._answer(START_SECONDS) != "ready":
            raise RuntimeError(f"{self._command} did not start; see {self._errors}")

    def _answer(self, seconds: float) -> Any:
        """The next line, or a Failure: then the process is ended."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            hung = not selector.select(seconds)
        line = b"" if hung else self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._end(at_once=hung)
        if hung:
            return Failure(True, f"no answer in {seconds:g} s")
        last = self._errors.read_text("utf-8", "replace").strip().splitlines()[-1:]
        return Failure(False, f"ended with status {status}: {' '.join(last)}")

    def _end(self, at_once: bool = False) -> int | None:
        """End the process, and what it started; the exit status."""
        if self._process is None:
            return None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if at_once else 30)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        status = self._process.wait()
        self._process.stdout.close()
        self._process = None
        return status
