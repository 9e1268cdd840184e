"""Processes that make shards, which can be watched image by image, stopped at once, and do not outlive their parent.

`ProcessPoolExecutor` alone gives none of the three: it reports whole shards, waits for them on Ctrl-C, and its workers
stay for ever when the parent is killed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.making.planning import ShardPlan
from shards.making.writer import ShardResult, make_shard
from shards.processes import end_with_parent

Submit = Callable[[Path, Path, ShardPlan], Future[ShardResult]]
Live = Callable[[], tuple[int, int]]  # images kept and images rejected so far, by all workers

_links: tuple[Any, Any] | None = None  # in a worker: the stop event and the two counters, shared with the parent


class Stopped(Exception):
    """Raised inside a worker when the parent wants it to stop."""


@contextmanager
def workers(number: int) -> Iterator[tuple[Submit, Live]]:
    """`number` processes. On any exception, Ctrl-C too, they stop after the image at hand and clean up."""
    context = multiprocessing.get_context("forkserver")  # a fork of this process could inherit locked threads
    context.set_forkserver_preload(["webdataset", "shards.making.writer"])  # a second of imports, once
    stop, counters = context.Event(), context.Array("q", 2)
    pool = ProcessPoolExecutor(number, mp_context=context, initializer=_start, initargs=(stop, counters))
    try:
        yield (lambda root, out, part: pool.submit(_make, root, out, part)), (lambda: tuple(counters[:]))
    except BaseException:
        stop.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def borrowed(executor: Executor) -> Iterator[tuple[Submit, None]]:
    """The same for an executor that somebody else runs, for example `dask.distributed`'s; nothing to watch there."""
    futures: list[Future[ShardResult]] = []

    def submit(root: Path, out: Path, part: ShardPlan) -> Future[ShardResult]:
        futures.append(executor.submit(make_shard, root, out, part))
        return futures[-1]

    try:
        yield submit, None
    finally:
        for future in futures:
            future.cancel()


def _start(stop: Any, counters: Any) -> None:
    """Set up a worker."""
    global _links
    _links = (stop, counters)
    end_with_parent()


def _make(root: Path, out: Path, part: ShardPlan) -> ShardResult:
    return make_shard(root, out, part, _tick)


def _tick(kept: bool) -> None:
    """Count one image; stop if the parent says so."""
    assert _links is not None, "workers are started by `_start`"
    stop, counters = _links
    with counters.get_lock():
        counters[0 if kept else 1] += 1
    if stop.is_set():
        raise Stopped
