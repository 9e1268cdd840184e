"""The folder of a run belongs to one training at a time."""

from __future__ import annotations

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engine.agreement import gathered, shared
from engine.command_line import Command
from engine.runtime import Runtime

LOCK = ".lock"
VISIBLE = 10.0  # seconds until a file that one node wrote must be seen by the others


def run_folder(command: Command) -> Path:
    """`run.out`; where it is empty, runs/RECIPE."""
    return Path(command.recipe.run.out or f"runs/{command.name}").expanduser()


@contextmanager
def claimed(folder: Path, runtime: Runtime) -> Iterator[None]:
    """Make the folder, and hold it for one training while it lasts. Collective.

    ValueError on every rank where another training holds it (perhaps on another node, if the file system can tell),
    where the folder cannot be made, or where it is not one folder for all ranks.
    """
    mark = shared(uuid.uuid4().hex, runtime)
    descriptor, problem = try_to_lock(folder, mark) if runtime.is_main else (None, None)
    problem = shared(problem, runtime)
    if problem:
        raise ValueError(f"run.out={folder}: {problem}")
    strangers = [rank for rank, seen in enumerate(gathered(sees(folder, mark), runtime)) if not seen]
    if strangers:
        raise ValueError(
            f"run.out={folder}: {len(strangers)} of {runtime.world_size} ranks, the first of them rank {strangers[0]}, "
            "do not see what rank 0 wrote there; choose a folder that all nodes share"
        )
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def sees(folder: Path, mark: str) -> bool:
    """Whether this rank finds rank 0's mark; file systems of clusters may show it some seconds later."""
    deadline = time.monotonic() + VISIBLE
    while True:
        with suppress(OSError):
            if (folder / LOCK).read_text() == mark:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def try_to_lock(folder: Path, mark: str) -> tuple[int | None, str | None]:
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
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, mark.encode())
    except OSError as error:
        os.close(descriptor)
        return None, f"cannot be written ({error.strerror}); make room, or choose another folder"
    return descriptor, None
