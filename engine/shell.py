"""How an entry script ends: its exit code, and an expected error as red text instead of a traceback.

| code | meaning | what a job script does |
|---|---|---|
| 0 | all is well, the run is finished | nothing |
| 1 | findings, or something on this machine failed | starts it again with `--resume auto`, a few times |
| 2 | the command asks for something impossible | nothing: somebody must look |
| 3 | too many steps had a loss or gradient that is no number (run.max_bad_steps) | nothing: somebody must look |
| 75 | stopped by a signal; nothing is lost (EX_TEMPFAIL of sysexits.h) | starts it again with `--resume auto` |
| 130 | a tool was interrupted from the keyboard | nothing |
| 143 | stopped by a signal, and the checkpoint could not be written | as for 1; the checkpoint before it is intact |
| 128 + n | ended at once by a second signal n, or killed by it | as for 1 |

These are the codes of the ranks; docs/cluster.md says what each launcher makes of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

FAILED, IMPOSSIBLE, DIVERGED, STOPPED, INTERRUPTED, NOT_SAVED = 1, 2, 3, 75, 130, 143
KILLED = 128  # and the number of the signal


def calm_threads() -> None:
    """Let torch's idle threads sleep soon; it reads this when it is loaded, so call it before.

    They spin for long by default: beside DALI's threads on a busy CPU that made steps up to 30 times slower, and a
    short spin costs nothing measurable on an idle one.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


class OnThisRank(RuntimeError):
    """An error that the other ranks may not have met: told by whichever rank it is."""


class Diverged(RuntimeError):
    """Too many steps in which loss or gradient was no number."""


class NotSaved(RuntimeError):
    """A run that was asked to stop could not write its checkpoint."""


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
        return exit_code(error)


def exit_code(error: Exception) -> int:
    """What an expected error is to the caller of the program."""
    codes = {ValueError: IMPOSSIBLE, Diverged: DIVERGED, NotSaved: NOT_SAVED}
    return next((code for kind, code in codes.items() if isinstance(error, kind)), FAILED)


def say_error(message: str, *, from_any_rank: bool = False, once_per: Literal["run", "node"] = "run") -> None:
    """Red text on stderr; an error that all ranks meet alike is told by the first of them, of the run or of each node.

    Names of files may hold bytes that no terminal can show.
    """
    first = os.environ.get("RANK" if once_per == "run" else "LOCAL_RANK", "0") == "0"
    if from_any_rank or first:
        from rich.console import Console
        from rich.text import Text

        shown = message.encode("utf-8", "backslashreplace").decode("utf-8")
        Console(stderr=True).print(Text(f"error: {shown}", style="red"), soft_wrap=True)
