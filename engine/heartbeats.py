"""A sign of life per rank, RUN/logs/rank_00000.heartbeat.json: who died, stopped or lags when ranks lose each other.

A thread writes it, so a rank that waits still gives signs of life and one that is stopped or gone does not. Where the
loop is comes from it too: nothing is sent between ranks, and the loop pays for an assignment.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from engine.runtime import Runtime

PERIOD = 3.0  # seconds between two signs of life
SILENCE = 4 * PERIOD  # seconds after which a rank counts as silent
STUCK_EXIT = 1
TRAINING = "training"  # the phase of a micro-step; the others may take as long as they need
_STDERR = 2  # the file descriptor: sys.stderr may be a progress bar's


@dataclass
class Beat:
    """One sign of life; times in seconds since 1970."""

    rank: int
    host: str
    pid: int
    step: int  # optimizer steps done
    phase: str  # what the rank is doing
    since: float  # when it began that
    alive_at: float
    ended: str = ""  # why it ended, where it could say so

    def tell(self, now: float) -> str:
        """Who it is, where it was, and what is known of its end."""
        who = f"rank {self.rank} (process {self.pid} on {self.host}), last seen in step {self.step + 1}, {self.phase}"
        if self.ended:
            return f"{who}: {self.ended}"
        if self.is_gone():
            return f"{who}: the process is gone (killed? out of memory?)"
        if self.state() == "T":
            return f"{who}: the process is stopped (SIGSTOP)"
        if now - self.alive_at > SILENCE:
            return f"{who}: no sign of life for {now - self.alive_at:.0f} s (stopped, or its machine is lost)"
        return f"{who} for {now - self.since:.0f} s"

    def state(self) -> str:
        """The kernel's letter for the process (proc(5)): "T" stopped, "Z" ended, ...; empty where it is elsewhere."""
        if self.host != socket.gethostname():
            return ""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return "X"

    def is_gone(self) -> bool:
        """Whether this is a process of this machine that runs no more (what nobody has waited for yet included)."""
        return self.state() in ("Z", "X")

    def is_culprit(self, now: float) -> bool:
        return bool(self.ended) or self.state() in ("Z", "X", "T") or now - self.alive_at > SILENCE


def heartbeat_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.heartbeat.json"


class Heartbeat:
    """This rank's signs of life. A file that cannot be written costs a warning and nothing else."""

    def __init__(self, folder: Path, runtime: Runtime, *, patience: float, note: Callable[[str], None]) -> None:
        """`folder` is that of the logs. `note` is told once of a write error, and why the process ends itself.

        After `patience` seconds (0: never) in one phase "training" the process ends itself: the stacks of its threads
        and what is known of the other ranks are printed.
        """
        now = time.time()
        self.file = heartbeat_file(folder, runtime.rank)
        self.runtime, self.patience, self.note = runtime, patience, note
        self.beat = Beat(runtime.rank, socket.gethostname(), os.getpid(), 0, "starting", now, now)
        self.unwritable = False
        self._since = time.monotonic()  # as beat.since: the clock of the day may be set, and must end no training
        self._closed = threading.Event()
        self.write()
        self._thread = threading.Thread(target=self._work, name="maskwright-heartbeat", daemon=True)
        self._thread.start()

    def at(self, phase: str, step: int | None = None) -> None:
        """The rank begins `phase`; `step` optimizer steps are done (default: as before)."""
        self.beat.phase, self.beat.since, self._since = phase, time.time(), time.monotonic()
        if step is not None:
            self.beat.step = step

    def close(self, ended: str = "") -> None:
        """The last sign of life, with the reason of the end where there is one to tell."""
        self._closed.set()
        self._thread.join()
        self.beat.ended = ended
        self.write()

    def write(self) -> None:
        """Replace the file, whole."""
        self.beat.alive_at = time.time()
        temporary = self.file.with_suffix(".tmp")
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(asdict(self.beat)) + "\n")
            os.replace(temporary, self.file)
        except OSError as error:
            if not self.unwritable:
                self.note(f"{self.file}: {error.strerror}; this rank gives no signs of life")
            self.unwritable = True

    def _work(self) -> None:
        while not self._closed.wait(PERIOD):
            self.write()
            waited = time.monotonic() - self._since
            if self.patience and self.beat.phase == TRAINING and waited > self.patience:
                self._end(waited)

    def _end(self, waited: float) -> None:
        """Nobody can interrupt a step that hangs inside a library: say all that is known, and end."""
        me = f"rank {self.runtime.rank}"
        line = f"{me}: no progress for {waited:.0f} s in step {self.beat.step + 1} (run.timeout). "
        with suppress(Exception):  # whatever it is, the process must end and the stacks be seen
            line += others(self.file.parent, self.runtime)
            self.note(f"end: {line}")
        os.write(_STDERR, f"\nerror: {line}\n".encode("utf-8", "backslashreplace"))
        faulthandler.dump_traceback(file=_STDERR, all_threads=True)
        os._exit(STUCK_EXIT)


def read_beats(folder: Path, runtime: Runtime) -> list[Beat]:
    """The last sign of life of every other rank; what cannot be read is left out."""
    beats = []
    for rank in range(runtime.world_size):
        with suppress(OSError, ValueError, TypeError):
            if rank != runtime.rank:
                beats.append(Beat(**json.loads(heartbeat_file(folder, rank).read_text())))
    return beats


def others(folder: Path, runtime: Runtime, wait: float = 0.0) -> str:
    """Which other ranks have ended, died or fallen silent, else what they all are doing; in one line.

    A rank of another machine is known to be silent only after a while: up to `wait` seconds are spent on finding one.
    """
    deadline = time.time() + wait
    while True:
        now, beats = time.time(), read_beats(folder, runtime)
        culprits = [beat for beat in beats if beat.is_culprit(now)]
        if culprits or now >= deadline:
            break
        time.sleep(0.2)
    # Who ended because it lost another is not the first: the oldest end is told first.
    told = sorted(culprits or beats, key=lambda beat: (LOST in beat.ended, beat.alive_at))
    if not told:
        return f"nothing is known of the other ranks: no signs of life in {folder}"
    return "; ".join(beat.tell(time.time()) for beat in told[:NAMED])


LOST = "lost the other ranks"  # what a rank says of its end that could not go on alone
NAMED = 3  # ranks in a message


def end_stopped(folder: Path, runtime: Runtime) -> None:
    """Kill the ranks of this run and this machine that are stopped: no launcher's SIGTERM would ever end them."""
    me = command_of(os.getpid())
    for beat in read_beats(folder, runtime):
        with suppress(OSError):  # gone meanwhile
            if beat.state() == "T" and command_of(beat.pid) == me:
                os.kill(beat.pid, signal.SIGKILL)


def command_of(pid: int) -> list[bytes]:
    """A process's command line without what launchers add for each rank."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return [word for word in words if not word.startswith((b"--local_rank", b"--local-rank"))]


def describe_loss(folder: Path, runtime: Runtime, error: BaseException) -> str:
    """A collective failed: who is to blame, as far as signs of life tell."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"rank {runtime.rank} {LOST}: {others(folder, runtime, wait=SILENCE + PERIOD)} [{reason[:200]}]"


def lost_others(error: BaseException) -> bool:
    """Whether an error is that of a collective whose other ranks are gone or do not answer (gloo and NCCL)."""
    text = str(error)
    signs = ("closed by peer", "Timed out waiting", "Connection reset", "Broken pipe", "remote process exited", "NCCL",
             "Socket closed", "Application timeout caused pair closure")  # fmt: skip
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)
