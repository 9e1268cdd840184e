"""A log per rank, RUN/logs/rank_00000.log: what this process said and met, also what only rank 0 shows.

Nothing that happens to a log stops a training: a folder that cannot be written or a full disk costs one warning.
"""

from __future__ import annotations

import os
import platform
import shlex
import socket
import sys
import time
import traceback
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from engine.fault_points import reached
from engine.runtime import Runtime
from shards.redaction import printable, redact

FOLDER = "logs"
PACKAGES = ("torch", "deepspeed", "timm", "nvidia-dali-cuda120", "nvidia-dali-cuda130", "webdataset", "numpy")
# What of the environment may matter and holds no secret: it is never written whole.
VARIABLES = ("CUDA_VISIBLE_DEVICES", "MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "WORLD_SIZE", "NCCL_DEBUG",
             "NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "SLURM_JOB_ID", "SLURM_RESTART_COUNT",
             "MASKWRIGHT_DATA", "MASKWRIGHT_FAULT")  # fmt: skip


class RankLog:
    """Lines with the time, appended to this rank's file."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        """`folder` is that of the logs; a resumed run goes on in the same file."""
        self.file = folder / f"rank_{runtime.rank:05d}.log"
        self.broken = False
        for line in start_lines(runtime):
            self.write(line)
        self._show_warning = warnings.showwarning
        self._warned: set[tuple] = set()
        warnings.showwarning = self._keep_warning

    def write(self, text: str) -> None:
        """One entry; lines after the first are indented."""
        if self.broken:
            return
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        lines = [printable(line) for line in redact(text).split("\n")]
        try:
            reached("log.write")
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("\n    ".join([f"{stamp} {lines[0]}", *lines[1:]]) + "\n")
        except OSError as error:
            self.broken = True
            print(f"warning: {self.file}: {error.strerror}; this rank keeps no log", file=sys.stderr)

    def error(self, error: BaseException) -> None:
        """An error with its traceback."""
        self.write("".join(traceback.format_exception(error)).rstrip())

    def close(self, text: str) -> None:
        """The last entry."""
        self.write(text)
        warnings.showwarning = self._show_warning

    def _keep_warning(self, message, category, filename, lineno, file=None, line=None) -> None:
        """Each warning once: libraries that reset Python's own memory of them would have one written at every step."""
        warning = (str(message), category, filename, lineno)
        if warning in self._warned:
            return
        self._warned.add(warning)
        self.write(f"warning: {category.__name__}: {message} ({filename}:{lineno})")
        self._show_warning(message, category, filename, lineno, file, line)


def start_lines(runtime: Runtime) -> list[str]:
    """Where and what this is: command, host, process, versions, and the few variables that matter."""
    variables = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    place = f"rank {runtime.rank} of {runtime.world_size} on {socket.gethostname()}, process {os.getpid()}"
    return [
        f"start: {place}, {runtime.device}",
        f"command: {shlex.join(sys.argv)}",
        f"versions: Python {platform.python_version()}, {', '.join(package_versions())}",
        f"environment: {' '.join(variables)}",
    ]


def package_versions() -> list[str]:
    """The packages that decide what a run computes, where they are installed."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found
