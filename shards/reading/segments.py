"""A stretch of the order as DALI's webdataset reader wants it: a list of (tar, index file) pairs.

The reader serves samples in the order of its indexes and takes the same tar any number of times, so the list *is* the
order: one pair for each run of samples that lie in the same tar, one line `i OFFSET SIZE` for each sample. Each pair
costs DALI two memory mappings, and the kernel limits those per process (`vm.max_map_count`), so an order is served
in segments. DALI trusts an index (a size beyond the file kills the process), so every entry is checked before
(sample_check.py).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.dataset import Dataset

# Shares of the kernel's limit. Two pipelines are alive at a time, in training and again in evaluation: the one being
# served and the next one being built. 2 x 3/7 + 2 x 1/15 < 1.
TRAINING_SHARE = 3 / 7
EVALUATION_SHARE = 1 / 15
MOST_PAIRS = 14_000  # building stays under a second
MOST_SAMPLES = 100_000  # lines are cheap, but a tar of its own would make one pair of the whole run

SCRATCH = Path("/dev/shm")  # memory: on a disk the thousands of small files of one segment took 0.3 to 4 s
_SCRATCH_SPARE = 2**30  # bytes that must be free there, of which a segment takes 60 MB for a moment

_PREFIX = "maskwright-indexes-"  # of folders with a lock: who sweeps must not meet others


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one rank processes in one forward pass."""

    epoch: int
    ids: np.ndarray  # int64 [B], sample ids
    positions: np.ndarray  # int64 [B], places in the global batch; -1: fills the batch up, nobody's
    step: int | None = None  # optimizer step, from 0; none in evaluation


Segment = tuple[MicroBatch, ...]


def pair_budget(share: float) -> int:
    """Pairs that one segment may hold when its pipeline has `share` of the process's memory mappings."""
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    return max(1, min(MOST_PAIRS, int(limit // 2 * share)))


def scratch_folder() -> str | None:
    """Where index files are written: in memory where there is room (containers may have 64 MB), else in $TMPDIR."""
    roomy = SCRATCH.is_dir() and shutil.disk_usage(SCRATCH).free > _SCRATCH_SPARE
    return str(SCRATCH) if roomy else None


@contextmanager
def index_folder() -> Iterator[Path]:
    """A folder for the index files of one segment, removed at the end.

    A process that is killed leaves its folder, and in memory that would stay until the next start of the machine; so
    whoever needs a folder removes the left ones first. Whether an owner lives is asked of a lock, which ends with the
    process; its number, in the name for the reader, can mean another process in a container beside this one.
    """
    root = Path(scratch_folder() or tempfile.gettempdir())
    sweep(root)
    folder, lock = _locked_folder(root)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder(root: Path) -> tuple[Path, int]:
    """A new folder and the descriptor of its lock; another process may sweep it away before the lock is held."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=root))
        with suppress(FileNotFoundError):
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            with suppress(OSError):  # a file system without locks: then nobody sweeps there
                fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.exists():
                return folder, lock
            os.close(lock)


def sweep(root: Path) -> None:
    """Remove the index folders of this user's dead processes."""
    for folder in root.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # somebody else's, gone by now, or locked by its owner
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == os.getuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def run_starts(tar: np.ndarray) -> np.ndarray:
    """Where a run of equal values begins: int64 [P], the first is 0."""
    return np.flatnonzero(np.diff(tar, prepend=-1))


def cut_segments(batches: Iterator[MicroBatch], tar: np.ndarray, most_pairs: int) -> Iterator[Segment]:
    """Consecutive micro-batches in segments of at most `most_pairs` pairs, and of at least one micro-batch."""
    segment: list[MicroBatch] = []
    pairs = samples = 0
    last_tar = -1
    for batch in batches:
        tars = tar[batch.ids]
        added = len(run_starts(tars)) - int(tars[0] == last_tar)
        if segment and (pairs + added > most_pairs or samples + len(tars) > MOST_SAMPLES):
            yield tuple(segment)
            segment, pairs, samples = [], 0, 0
            added = len(run_starts(tars))
        segment.append(batch)
        pairs, samples, last_tar = pairs + added, samples + len(tars), int(tars[-1])
    if segment:
        yield tuple(segment)


def write_segment(dataset: Dataset, ids: np.ndarray, folder: Path) -> tuple[list[str], list[str]]:
    """Write the index files of a segment into `folder`; return (tars, index files), one entry per pair.

    The samples must have passed `shards.reading.sample_check`: DALI trusts what stands here.
    """
    starts = run_starts(dataset.tar[ids])
    ends = np.append(starts[1:], len(ids))
    lines = [
        f"i {offset} {size}\n"
        for offset, size in zip(dataset.offset[ids].tolist(), dataset.size[ids].tolist(), strict=True)
    ]
    indexes = []
    for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        indexes.append(f"{folder}/{number}")
        with open(indexes[-1], "w") as index:
            index.write(f"v1.1 {end - start}\n" + "".join(lines[start:end]))
    return [str(dataset.paths[tar]) for tar in dataset.tar[ids[starts]]], indexes
