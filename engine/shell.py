"""How an entry script ends: its exit code, and an expected error as red text instead of a traceback.

Exit codes: 0 all is well; 1 findings, or something on this machine failed; 2 the command asks for something
impossible; 130 interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Callable

FAILED, IMPOSSIBLE, INTERRUPTED = 1, 2, 130


def calm_threads() -> None:
    """Let torch's idle threads sleep soon; it reads this when it is loaded, so call it before.

    They spin for long by default: beside DALI's threads on a busy CPU that made steps up to 30 times slower, and a
    short spin costs nothing measurable on an idle one.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


class OnThisRank(RuntimeError):
    """An error that the other ranks may not have met: told by whichever rank it is."""


def run(
    work: Callable[[], int],
    *,
    debug: bool,
    interrupted: str = "interrupted",
    expected: tuple[type[Exception], ...] = (ValueError, RuntimeError, OSError),
) -> int:
    """Call `work` and return its exit code, or that of its error.

    Errors that are not `expected` keep their traceback, and so do all with `debug`.
    """
    calm_threads()
    try:
        return work()
    except KeyboardInterrupt:
        say_error(interrupted)
        return INTERRUPTED
    except expected as error:
        if debug:
            raise
        say_error(str(error), from_any_rank=isinstance(error, OnThisRank))
        return IMPOSSIBLE if isinstance(error, ValueError) else FAILED


def say_error(message: str, *, from_any_rank: bool = False) -> None:
    """Red text on stderr; an error that all ranks meet alike is told by the first of them only.

    Names of files may hold bytes that no terminal can show.
    """
    if from_any_rank or os.environ.get("RANK", "0") == "0":
        from rich.console import Console
        from rich.text import Text

        shown = message.encode("utf-8", "backslashreplace").decode("utf-8")
        Console(stderr=True).print(Text(f"error: {shown}", style="red"), soft_wrap=True)
