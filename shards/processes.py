"""Calls in other processes that neither outlive their parent nor answer Ctrl-C for it, and leave nothing behind.

One thread of ours per process hands it a call over a pipe and waits for the answer, so a future is a thread's. There
are no semaphores as `ProcessPoolExecutor` has them: these are files in /dev/shm, which stay for ever where a whole
process group is killed. And a process that dies costs the call that it was at, not the others.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

_ANSWER, _ERROR, _NEWS = range(3)  # kinds of messages from a process
_link: Connection | None = None  # in such a process: its end of the pipe


class Stopped(Exception):
    """Raised by `tell` where the parent wants the call to end."""


class Processes:
    """At most `number` processes, started when they are needed; used in a `with`.

    `preload` are modules that all of them need, imported once. At the end calls that have not begun are cancelled, and
    the others finish; after an exception, Ctrl-C too, they are asked to stop, which those that `tell` will do.
    """

    def __init__(self, number: int, preload: Sequence[str]) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")  # a fork could inherit held locks
        self._context.set_forkserver_preload(list(preload))
        self._threads = ThreadPoolExecutor(number, thread_name_prefix="maskwright-process")
        self._idle: list[tuple[ForkServerProcess, Connection]] = []
        self._busy: set[Connection] = set()
        self._stopping = False
        self._lock = threading.Lock()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if kind is not None:
            with self._lock:
                self._stopping = True
                for link in self._busy:
                    with suppress(OSError):  # it has died
                        link.send(None)
        self._threads.shutdown(wait=True)
        for _, link in self._idle:
            link.close()  # the end of its calls
        for process, _ in self._idle:
            process.join()

    def submit(self, function: Callable[..., Any], *values: Any, news: Callable[[Any], None] | None = None) -> Future:
        """Call `function(*values)` in one of the processes; `news` is called, in a thread, with what it tells.

        The future raises what the function raises, and BrokenProcessPool where its process dies.
        """
        return self._threads.submit(self._call, function, values, news)

    def _call(self, function: Callable[..., Any], values: tuple[Any, ...], news: Callable[[Any], None] | None) -> Any:
        with self._lock:
            process, link = self._idle.pop() if self._idle else (None, None)
        if process is None:
            process, link = self._started()
        try:
            message = self._asked(link, function, values, news)
        except (EOFError, OSError) as error:
            with self._lock:  # whoever starts a process looks after those that have ended, too
                process.join()
            raise BrokenProcessPool(f"a process ended with exit status {process.exitcode}") from error
        except BaseException:  # of ours: the call cannot be sent, or `news` failed
            link.close()
            raise
        finally:
            with self._lock:
                self._busy.discard(link)
        with self._lock:
            self._idle.append((process, link))
        if message[0] == _ERROR:
            raise message[1]
        return message[1]

    def _asked(
        self, link: Connection, function: Callable[..., Any], values: tuple, news: Callable[[Any], None] | None
    ) -> tuple[int, Any]:
        """A process's last message about a call."""
        link.send((function, values))
        with self._lock:
            self._busy.add(link)  # not before: two threads must not send at once
            if self._stopping:
                link.send(None)
        while (message := link.recv())[0] == _NEWS:
            if news:
                news(message[1])
        return message

    def _started(self) -> tuple[ForkServerProcess, Connection]:
        ours, theirs = self._context.Pipe()
        # A daemon: after a second Ctrl-C, which cuts `__exit__` short, Python must not wait for those that are idle.
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        with self._lock:  # the fork server answers one at a time
            process.start()
        theirs.close()
        return process, ours


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
    with Processes(min(num_workers, len(arguments)) or 1, [function.__module__]) as processes:
        futures = {processes.submit(function, *values): position for position, values in enumerate(arguments)}
        for future in as_completed(futures):
            yield futures[future], future


def tell(news: object) -> None:
    """In a call: let the parent know something. Raises Stopped if it wants no more."""
    assert _link is not None, "only a call in one of `Processes` can tell"
    if _link.poll():
        _link.recv()
        raise Stopped
    _link.send((_NEWS, news))


def _serve(link: Connection) -> None:
    """A process: call after call, until the other end of the pipe is closed."""
    global _link
    _link = link
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with suppress(EOFError, ConnectionError):
        while True:
            call = link.recv()
            if call is not None:  # asked to stop after the last answer had been given
                link.send_bytes(_answer(*call))


def _answer(function: Callable[..., Any], values: tuple[Any, ...]) -> bytes:
    try:
        answer = _ANSWER, function(*values)
    except Exception as error:  # noqa: BLE001  whoever asked gets it
        answer = _ERROR, error
    try:
        return pickle.dumps(answer)
    except Exception as error:  # noqa: BLE001  an error of a library may not travel
        return pickle.dumps((_ERROR, RuntimeError(f"{answer[1]!r} cannot be sent to the parent: {error}")))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _called(function: Callable[..., Any], values: tuple[Any, ...]) -> Future:
    future: Future = Future()
    try:
        future.set_result(function(*values))
    except Exception as error:  # noqa: BLE001  as an executor does: whoever asks for the result gets it
        future.set_exception(error)
    return future
