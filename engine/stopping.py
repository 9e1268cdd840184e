"""All ranks stop after the same step: what a signal asked of one of them, or of all at different moments."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from engine.agreement import shared
from engine.checkpoints.keeping import SaveError
from engine.runtime import Runtime
from engine.shell import NotSaved
from engine.signals import REQUESTS

ASKED = "stop"  # key on the board


class StopAgreement:
    """Asked once per step. The question travels while the optimizer works, on the host: no device waits for it."""

    def __init__(self, runtime: Runtime, timeout: float) -> None:
        """From here on a request is kept until it is asked for. `timeout` in seconds, of the collectives. Collective.

        Nothing is sent in a world of one.
        """
        self.signal = torch.zeros((), dtype=torch.int32)
        self.question: dist.Work | None = None
        self.board: dist.Store | None = None
        if runtime.world_size > 1:
            self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            self.board = make_board(runtime, timeout)
        REQUESTS.keep_until_asked()

    def ask(self) -> None:
        """Begin to ask all ranks. Collective."""
        self.signal.fill_(REQUESTS.first)
        if self.board:
            self.question = dist.all_reduce(self.signal, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def answer(self) -> int:
        """The signal with which any rank had been asked to stop at `ask`, 0 for none; the same on all ranks."""
        if self.question:
            self.question.wait()
        return int(self.signal)

    def agreed(self) -> int:
        """Ask and wait for the answer. Collective."""
        self.ask()
        return self.answer()

    def is_near(self) -> bool:
        """Whether this rank knows of a request, its own or another's; the others may learn it a little later.

        For long work between steps: who leaves it early does what is collective in it all the same.
        """
        if self.board is None:
            return bool(REQUESTS.first)
        with suppress(RuntimeError):  # the board is gone with its rank: the next collective says so
            if REQUESTS.first:
                self.board.set(ASKED, "")
            return bool(REQUESTS.first) or self.board.check([ASKED])
        return bool(REQUESTS.first)


@contextmanager
def saving(asked: int) -> Iterator[None]:
    """Around the save of a run that was `asked` to stop (0: it was not): NotSaved where that fails."""
    try:
        yield
    except (SaveError, OSError) as error:
        if not asked:
            raise
        raise NotSaved(f"{signal.Signals(asked).name}: {error}") from error


def make_board(runtime: Runtime, timeout: float) -> dist.Store:
    """A store of rank 0 that all ranks read without waiting for each other. Collective."""
    make = partial(dist.TCPStore, os.environ["MASTER_ADDR"], timeout=timedelta(seconds=timeout), wait_for_workers=False)
    board = make(port=0, is_master=True) if runtime.is_main else None
    port = shared(board.port if board else None, runtime)
    return board or make(port=port, is_master=False)
