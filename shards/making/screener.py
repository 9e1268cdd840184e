"""Screening in a process that may die, because a decoder may: it hangs, takes all memory, or crashes on hostile bytes.

`Screener` keeps one child process that judges many images, so an image costs no process. The child announces what it
begins, sets an alarm for it and bounds its own memory; the kernel ends it when an image breaks a limit. The image at
hand is then judged again, alone in a fresh child, and only what ends that one too is rejected: `timeout`, `memory` or
`crash`. All other images of the request are simply judged again.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

from shards.making.screening import (
    OutOfMemory,
    Rejected,
    Screened,
    gate_batches,
    prepare_training_decoder,
    refused_by_training_decoder,
    screen,
)

SECONDS = 30.0  # wall time for one image
BYTES = 2**30  # of address space that one image may add
_MEMORY_STATUS = 77  # exit status of a child that could not get the memory it asked for
_READY = "ready"
_ROOT = Path(__file__).resolve().parents[2]
_kept = threading.local()


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What an image is judged by: the arguments of `screening.screen`."""

    max_pixels: int
    short_side: int = 0
    quality: int = 95


class _Died(Exception):
    """The child ended while it judged the images `first` to `last` of a request."""

    def __init__(self, status: int, first: int, last: int) -> None:
        super().__init__(status, first, last)
        self.status = status
        self.first = first
        self.last = last


class Screener:
    """Judges encoded images in a child process; not to be shared between threads.

    `seconds` is the wall time and `memory` the bytes of address space that one image may take.
    """

    def __init__(self, *, seconds: float = SECONDS, memory: int = BYTES) -> None:
        self._seconds = seconds
        self._memory = memory
        self._start()

    def judge(self, images: Sequence[bytes], rules: Rules) -> list[Screened | Rejected]:
        """One verdict per image, as `screen` and the decoder of the training give it, or by the limits.

        Raises RuntimeError when the child cannot be started or fails by a fault of its own.
        """
        alone_in_fresh = len(images) == 1 and not self._used
        try:
            return self._ask(images, rules)
        except _Died as death:
            self.close()
            self._start()
            if alone_in_fresh:
                return [self._verdict(death.status)]
            suspects = range(death.first, death.last)
        verdicts = {place: self.judge([images[place]], rules)[0] for place in suspects}
        others = [place for place in range(len(images)) if place not in suspects]
        if others:
            verdicts |= zip(others, self.judge([images[place] for place in others], rules), strict=True)
        return [verdicts[place] for place in range(len(images))]

    def close(self) -> None:
        """End the child."""
        self._end()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        limits = [str(self._seconds), str(self._memory)]
        command = [sys.executable, "-m", "shards.making.screener", str(theirs.fileno()), *limits]
        with theirs:
            self._process = subprocess.Popen(
                command, cwd=_ROOT, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
        self._end = weakref.finalize(self, _end_child, self._process, self._connection)
        self._used = False
        try:
            self._connection.recv()
        except (EOFError, OSError) as error:
            status = self._process.wait()
            raise RuntimeError(f"the screening process did not start: {_told(status)}") from error

    def _ask(self, images: Sequence[bytes], rules: Rules) -> list[Screened | Rejected]:
        """The child's verdicts; raises _Died with the images that it had announced."""
        self._used = True
        first, last = 0, len(images)
        try:
            self._connection.send((list(images), rules.max_pixels, rules.short_side, rules.quality))
            while isinstance(answer := self._connection.recv(), tuple):
                first, last = answer
        except (EOFError, OSError) as error:
            status = self._process.wait()
            if status > 0 and status != _MEMORY_STATUS:
                raise RuntimeError(f"the screening process failed: {_told(status)}") from error
            raise _Died(status, first, last) from error
        except BaseException:  # Ctrl-C: what the child still says would be taken for its next answer
            self.close()
            raise
        return [_received(image, fields) for image, fields in zip(images, answer, strict=True)]

    def _verdict(self, status: int) -> Rejected:
        """Why the child ended, as a reason to leave the image out."""
        if status == -signal.SIGALRM:
            return Rejected("timeout", f"decoding takes longer than {self._seconds:g} s")
        if status in (_MEMORY_STATUS, -signal.SIGKILL):
            return Rejected("memory", f"decoding takes more than {self._memory / 2**20:,.0f} MiB")
        return Rejected("crash", f"the decoder {_told(status)}")


def kept_screener() -> Screener:
    """The screener of this thread, started when it is first asked for; it ends with the thread."""
    if not hasattr(_kept, "screener"):
        _kept.screener = Screener()
    return _kept.screener


def _end_child(process: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    process.kill()
    process.wait()


def _told(status: int) -> str:
    """An exit status in words."""
    return f"ended with {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"


def _received(image: bytes, fields: tuple) -> Screened | Rejected:
    """A verdict from what `_fields` made of it."""
    if len(fields) == 2:
        return Rejected(*fields)
    data, *about = fields
    return Screened(image if data is None else data, *about)


def _fields(image: bytes, verdict: Screened | Rejected) -> tuple:
    """A verdict as plain values; bytes that did not change are not sent back."""
    if isinstance(verdict, Rejected):
        return verdict.reason, verdict.detail
    data = None if verdict.data is image else verdict.data
    return data, verdict.extension, verdict.height, verdict.width


def _serve(connection: Connection, seconds: float, memory: int) -> None:
    """The child: judge request after request; EOFError or ConnectionError when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process even inside a codec that holds Python's lock
    with suppress(OSError):  # some containers forbid it
        Path("/proc/self/oom_score_adj").write_text("1000")  # when memory runs out, this process goes, not its parent
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    prepare_training_decoder()
    connection.send(_READY)

    def begin(first: int, last: int) -> None:
        connection.send((first, last))
        signal.setitimer(signal.ITIMER_REAL, seconds)

    while True:
        images, max_pixels, short_side, quality = connection.recv()
        _bound_memory(memory)
        try:
            verdicts = _judged(images, Rules(max_pixels=max_pixels, short_side=short_side, quality=quality), begin)
        except (MemoryError, OutOfMemory):
            os._exit(_MEMORY_STATUS)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send([_fields(image, verdict) for image, verdict in zip(images, verdicts, strict=True)])


def _judged(images: Sequence[bytes], rules: Rules, begin: Callable[[int, int], None]) -> list[Screened | Rejected]:
    """The header of every image by Pillow, then all of it by the decoder of the training, in batches."""
    verdicts: list[Screened | Rejected] = []
    for place, image in enumerate(images):
        begin(place, place + 1)
        try:
            verdicts.append(screen(image, **asdict(rules), decode=False))
        except Rejected as rejected:
            verdicts.append(rejected)
    passed = [place for place, verdict in enumerate(verdicts) if isinstance(verdict, Screened)]
    sound = [verdict for verdict in verdicts if isinstance(verdict, Screened)]
    for batch in gate_batches(sound):
        begin(passed[batch][0], passed[batch][-1] + 1)
        for place, refusal in zip(passed[batch], refused_by_training_decoder(sound[batch]), strict=True):
            verdicts[place] = refusal or verdicts[place]
    return verdicts


def _bound_memory(memory: int) -> None:
    """Let the address space grow by `memory` bytes from here; what one image left behind is not the next one's."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


if __name__ == "__main__":
    with suppress(EOFError, ConnectionError):
        _serve(Connection(int(sys.argv[1])), float(sys.argv[2]), int(sys.argv[3]))
