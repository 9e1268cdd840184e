"""The folder of a run belongs to one training at a time."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from engine.agreement import shared
from engine.runtime import Runtime

LOCK = ".lock"


def claim(folder: Path, runtime: Runtime) -> int | None:
    """Make the folder and lock it until `release` or this process's end; the lock's descriptor on rank 0. Collective.

    ValueError on every rank where another training holds it (perhaps on another node, if the file system can tell), or
    where the folder cannot be made.
    """
    descriptor, problem = try_to_lock(folder) if runtime.is_main else (None, None)
    problem = shared(problem, runtime)
    if problem:
        raise ValueError(f"run.out={folder}: {problem}")
    return descriptor


def try_to_lock(folder: Path) -> tuple[int | None, str | None]:
    """The lock's descriptor, or what is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        return None, f"cannot be written ({error.strerror}); choose another folder"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None, "another training is writing there; wait for it, stop it, or choose another folder"
    except OSError:  # a file system without locks
        pass
    return descriptor, None


def release(descriptor: int | None) -> None:
    """Let others train in the folder."""
    if descriptor is not None:
        os.close(descriptor)
