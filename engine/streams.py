"""Output that stops nothing: a full disk behind it, or a reader that has gone, costs lines and not the training."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TextIO


class Lossy:
    """A text stream that drops what it cannot write; everything else is the stream's own."""

    def __init__(self, stream: TextIO, title: str) -> None:
        self.stream, self.title = stream, title
        self.broken = False

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError as error:
            self.warn(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.warn(error)

    def warn(self, error: OSError) -> None:
        """Once, on stderr; where that is the broken one, nobody is left to be told."""
        if not self.broken:
            self.broken = True
            with suppress(OSError):
                text = f"warning: {self.title}: {error.strerror}; its lines are lost"
                print(text, file=sys.stderr, flush=True)


def lose_rather_than_stop() -> None:
    """From here on stdout and stderr raise no error of the system.

    Python's own would end the run at the next line, and rich's without a word.
    """
    if sys.stdout and sys.stderr:  # None where they were closed: then nothing is written
        sys.stdout, sys.stderr = Lossy(sys.stdout, "stdout"), Lossy(sys.stderr, "stderr")
