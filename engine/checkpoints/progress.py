"""Long work on files is seen to advance: how much has been written so far."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

EVERY = 10.0  # seconds between two reports
GIGA = 1e9


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder that may be growing or vanishing."""
    total = 0
    with suppress(OSError):
        for path in folder.rglob("*"):
            with suppress(OSError):
                total += path.stat().st_size if path.is_file() else 0
    return total


def gigabytes(count: float) -> str:
    return f"{count / GIGA:.2f} GB" if count >= GIGA / 10 else f"{count / 1e6:.2f} MB"


@contextmanager
def watched(
    measure: Callable[[], int], expected: float, what: str, say: Callable[[str], None] | None, every: float = EVERY
) -> Iterator[None]:
    """Have `say` report the bytes that `measure` finds every `every` seconds; None: nobody listens."""
    ended = threading.Event()

    def report() -> None:
        while not ended.wait(every):
            say(f"{what}: {gigabytes(measure())} of about {gigabytes(expected)}")

    watcher = threading.Thread(target=report, daemon=True)
    if say:
        watcher.start()
    try:
        yield
    finally:
        ended.set()
        if say:
            watcher.join()
