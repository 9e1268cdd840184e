"""A rank does not outlive its launcher: when that ends, the rank saves and ends too, or is ended.

A launcher that is killed cannot stop its ranks: they would train on and hold the GPUs. But one may also die of a signal
that its whole process group has got, while its ranks save. So its end is a request to stop, with a deadline.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from engine.signals import REQUESTS

PR_SET_PDEATHSIG = 1  # linux/prctl.h
DEADLINE = 60.0  # seconds from the launcher's end to the end of its ranks


def stop_with(launcher: int) -> None:
    """Have this process stop when `launcher`, its parent, has ended, however that ended (Linux; elsewhere nothing).

    Under `deepspeed` also when that has ended, which is the launcher's own parent.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGCONT)  # a rank that is stopped could not notice
    watched = [process for process in (opened(launcher), deepspeed_runner()) if process is not None]
    threading.Thread(target=stop_after, args=(watched,), name="maskwright-launcher", daemon=True).start()
    if os.getppid() != launcher:
        stop()


def opened(process: int) -> int | None:
    """File descriptor of a process, None where it has ended."""
    with suppress(OSError):
        return os.pidfd_open(process)
    return None


def deepspeed_runner() -> int | None:
    """File descriptor of the process `deepspeed`, where it is alive and this is one of its ranks.

    It starts the ranks through a second process, their parent, which goes on when `deepspeed` alone is killed. Another
    grandparent than `deepspeed`, such as the shell of a user who logs out, is nobody to stop with.
    """
    with suppress(OSError):  # processes end while they are looked at
        process = os.getpid()
        for known_by in (b"deepspeed.launcher.launch", b"deepspeed"):
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])  # its parent
            if known_by not in Path(f"/proc/{process}/cmdline").read_bytes():
                return None
        return opened(process)
    return None


def stop_after(processes: list[int]) -> None:
    """Wait for the end of one of the processes, given as file descriptors, and stop."""
    if processes:
        select.select(processes, [], [])
        stop()


def stop() -> None:
    """Ask for a stop; whoever has not ended by the deadline is killed."""
    threading.Thread(target=kill_at_deadline, name="maskwright-deadline", daemon=True).start()
    if not REQUESTS.first:
        REQUESTS.make(signal.SIGTERM, reason="the launcher has ended")


def kill_at_deadline() -> None:
    time.sleep(DEADLINE)
    os.kill(os.getpid(), signal.SIGKILL)
