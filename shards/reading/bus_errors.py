"""A shard that gets shorter while it is read ends the process with the shard's name instead of a bare SIGBUS.

DALI maps the shards into memory, and the kernel answers a read behind the end of a mapped file with that signal, which
kills without a word. (DALI can read without mappings, at half the speed and with an open file for each pair.) Python's
handler of the signal only notes it in a pipe and returns, so the thread that read tries again, for ever; meanwhile a
thread of ours takes the note, looks which shard it was, and ends the process. (It cannot where the thread that reads
holds the interpreter. DALI's do not, and our own check of a segment looks for the end of the file first.)
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from shards.dataset import Dataset

EXIT_CODE = 1
_STDERR = 2
_END = 0  # in the pipe: no signal has this number


@contextmanager
def explained(datasets: Sequence[Dataset], rank: int) -> Iterator[None]:
    """Inside, SIGBUS ends the process with a line about `datasets`. Call it in the main thread."""
    notes, note = os.pipe()
    os.set_blocking(note, False)  # the thread that tries again fills the pipe
    before = signal.signal(signal.SIGBUS, lambda number, frame: None)
    descriptor = signal.set_wakeup_fd(note, warn_on_full_buffer=False)
    watcher = threading.Thread(target=_watch, args=(notes, datasets, rank), name="maskwright-bus-errors", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        signal.signal(signal.SIGBUS, before)
        os.write(note, bytes([_END]))
        watcher.join()
        os.close(notes)
        os.close(note)


def _watch(notes: int, datasets: Sequence[Dataset], rank: int) -> None:
    while (signals := os.read(notes, 1)[0]) != _END:  # every signal of the process comes by
        if signals == signal.SIGBUS:
            line = f"\nerror: rank {rank}: {explanation(datasets)}\n"
            os.write(_STDERR, line.encode("utf-8", "backslashreplace"))
            os._exit(EXIT_CODE)


def explanation(datasets: Sequence[Dataset]) -> str:
    """What a SIGBUS means: the first shard that is shorter than its index says, or what else it may be."""
    for dataset in datasets:
        needed = np.zeros(len(dataset.paths), np.int64)
        np.maximum.at(needed, dataset.tar, dataset.offset + dataset.size)
        for path, end in zip(dataset.paths, needed.tolist(), strict=True):
            held = path.stat().st_size if path.exists() else end
            if held < end:
                return (
                    f"{path}: got shorter while it was read: {held:,} bytes, its last image ends at {end:,}; restore "
                    "the shard and add --resume (never write to a shard in use: write beside it and rename)"
                )
    return (
        "memory that is mapped could not be read (SIGBUS), though every shard is as long as its index says; see "
        "whether /dev/shm is full (`df /dev/shm`; containers: --shm-size) or a disk fails (`dmesg`)"
    )
