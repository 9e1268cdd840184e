"""A conversion whose shards are made by the workers of a dask.distributed cluster.

The workers must be able to import this project, and see source and output under the same absolute paths: that is asked
of each before the work begins. A worker that dies is dask's business (its shard is made by another one); a cluster
without workers, or without an answer, ends the conversion, and the same command goes on later.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shards.making.conversion import ConversionFailed, Progress, Report, convert
from shards.making.planning import Plan

if TYPE_CHECKING:
    from distributed import Client

CONNECT_SECONDS = 10  # for the scheduler to answer
WORKER_SECONDS = 30  # for the first worker to appear
ALONE_SECONDS = 60.0  # without any worker, or without the scheduler, before the conversion gives up
_ASK_SECONDS = 1.0  # between two questions to the scheduler
_START = "start `dask scheduler` and `dask worker ADDRESS --nworkers N --nthreads 1`"


def convert_on_cluster(
    plan: Plan, out: Path, address: str, *, max_bad_fraction: float = 0.001, progress: Progress | None = None
) -> Report:
    """`convert` with the workers of the scheduler at `address`, for example tcp://10.0.0.1:8786.

    Raises ConversionFailed where dask is not installed, the scheduler does not answer, has no workers or loses them
    all, or where a worker does not see the paths; else as `convert` does.
    """
    out, root = out.absolute(), plan.listing.root.absolute()
    plan = replace(plan, listing=replace(plan.listing, root=root))
    with _connected(address) as client:
        out.mkdir(parents=True, exist_ok=True)
        _check_workers(client, address, root, out)
        from distributed import CancelledError, KilledWorker

        try:
            return convert(
                plan,
                out,
                executor=client.get_executor(),
                watch=_watch(client, address),
                max_bad_fraction=max_bad_fraction,
                progress=progress,
            )
        except (KilledWorker, CancelledError) as error:
            raise ConversionFailed(
                f"scheduler={address}: its workers died again and again at one shard, or it gave up ({error}); look at "
                "their logs (too little memory?) and run the same command again to go on"
            ) from error


@contextmanager
def _connected(address: str) -> Iterator[Client]:
    try:
        from distributed import Client
    except ImportError as error:
        raise ConversionFailed(f"scheduler={address}: needs dask; pip install 'maskwright[cluster]'") from error
    try:
        client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:  # a timeout is an OSError; odd addresses raise all three
        raise ConversionFailed(f"scheduler={address}: no answer ({' '.join(str(error).split())}); {_START}") from error
    try:
        client.wait_for_workers(1, timeout=WORKER_SECONDS)
        yield client
    except TimeoutError as error:
        raise ConversionFailed(f"scheduler={address}: no worker within {WORKER_SECONDS} s; {_START}") from error
    finally:
        client.close(timeout=CONNECT_SECONDS)


def _check_workers(client: Client, address: str, root: Path, out: Path) -> None:
    """Raise ConversionFailed unless every worker can import this module and see both folders."""
    try:
        answers = client.run(_look, root, out, on_error="return")
    except OSError as error:
        raise ConversionFailed(f"scheduler={address}: its workers do not answer: {error}") from error
    problems = {worker: answer for worker, answer in answers.items() if answer}
    if problems:
        worker, problem = next(iter(sorted(problems.items())))
        raise ConversionFailed(
            f"scheduler={address}: {len(problems)} of {len(answers)} workers cannot take part, first {worker}: "
            f"{problem}; workers need this project on their PYTHONPATH and the same paths"
        )


def _look(root: Path, out: Path) -> str:
    """What a worker lacks, or nothing."""
    if not root.exists():
        return f"it does not see the source {root}"
    if not os.access(out, os.W_OK):
        return f"it cannot write into {out}"
    return ""


def _watch(client: Client, address: str) -> Callable[[], None]:
    """A function that raises ConversionFailed when the cluster has been without workers for `ALONE_SECONDS`."""
    asked = seen = time.monotonic()

    def look() -> None:
        nonlocal asked, seen
        now = time.monotonic()
        if now - asked < _ASK_SECONDS:
            return
        asked = now
        if _has_workers(client):
            seen = now
        elif now - seen > ALONE_SECONDS:
            raise ConversionFailed(
                f"scheduler={address}: no workers, or no answer, for {ALONE_SECONDS:.0f} s; finished shards are kept, "
                "run the same command again to go on"
            )

    return look


def _has_workers(client: Client) -> bool:
    if client.status != "running":
        return False
    try:
        return bool(client.sync(client.scheduler.ncores, callback_timeout=CONNECT_SECONDS))
    except OSError:  # a timeout is one
        return False
