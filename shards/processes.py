"""One function on many arguments, in several processes that neither outlive their parent nor answer Ctrl-C for it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import connection
from typing import Any


def call_each(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], num_workers: int
) -> Iterator[tuple[int, Future]]:
    """Call `function(*arguments[i])` for every i; yields (i, its finished future) in the order in which they finish.

    A single worker is this process.
    """
    if num_workers == 1:
        for position, values in enumerate(arguments):
            yield position, _called(function, values)
        return
    context = multiprocessing.get_context("forkserver")  # a fork of this process could inherit locked threads
    context.set_forkserver_preload([function.__module__])  # its imports, once instead of per worker
    pool = ProcessPoolExecutor(min(num_workers, len(arguments)) or 1, mp_context=context, initializer=end_with_parent)
    try:
        futures = {pool.submit(function, *values): position for position, values in enumerate(arguments)}
        for future in as_completed(futures):
            yield futures[future], future
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def end_with_parent() -> None:
    """Set up a worker: Ctrl-C is the parent's business, and the parent's death ends the worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent.sentinel,), daemon=True).start()


def _die_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _called(function: Callable[..., Any], values: tuple[Any, ...]) -> Future:
    future: Future = Future()
    try:
        future.set_result(function(*values))
    except Exception as error:  # noqa: BLE001  as an executor does: whoever asks for the result gets it
        future.set_exception(error)
    return future
