"""Processes that make shards, which can be watched image by image and stopped at once, or somebody else's executor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from pathlib import Path

from shards.making.planning import ShardPlan
from shards.making.writer import ShardResult, make_shard
from shards.processes import Processes, tell

Submit = Callable[[Path, Path, ShardPlan], Future[ShardResult]]
Live = Callable[[], tuple[int, int]]  # images kept and images rejected so far, by all workers

_TELL_SECONDS = 0.1  # between two messages of a worker to its parent


@contextmanager
def workers(number: int) -> Iterator[tuple[Submit, Live]]:
    """`number` processes. On any exception, Ctrl-C too, they stop within `_TELL_SECONDS` and an image, and clean up."""
    counts: dict[int, tuple[int, int]] = {}  # by shard

    def submit(root: Path, out: Path, part: ShardPlan) -> Future[ShardResult]:
        return processes.submit(_make, root, out, part, news=lambda told: counts.update({part.number: told}))

    def live() -> tuple[int, int]:
        kept, rejected = zip((0, 0), *list(counts.values()), strict=True)
        return sum(kept), sum(rejected)

    with Processes(number, ["webdataset", "shards.making.writer"]) as processes:  # a second of imports, once
        yield submit, live


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


def _make(root: Path, out: Path, part: ShardPlan) -> ShardResult:
    """In a worker: make a shard and tell how far it is."""
    counts, told = [0, 0], 0.0

    def tick(kept: bool) -> None:
        nonlocal told
        counts[0 if kept else 1] += 1
        if time.monotonic() - told >= _TELL_SECONDS or sum(counts) == len(part.items):
            tell(tuple(counts))
            told = time.monotonic()

    return make_shard(root, out, part, tick)
