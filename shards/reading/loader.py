"""Batches on the device, in an order that is known in advance.

`TrainLoader` serves the micro-batches of one rank from any step on; `EvaluationLoader` serves given samples once.
Both cut their order into segments (segments.py) and serve them one after the other (stream.py). A sample that cannot
be decoded ends the run or is replaced (quarantine.py), by `data.on_bad_sample`; a batch that does not come ends it
after `data.timeout` seconds (watchdog.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from recipes.schema import Data
from shards.augment.views import find_view
from shards.dataset import Dataset
from shards.draws.masks import NO_MASK, MaskDraws
from shards.draws.order import GlobalOrder, micro_positions, num_micro_steps
from shards.reading.bad_samples import BadSamples
from shards.reading.cores import cores_per_rank, decoding_threads
from shards.reading.feed import Feed
from shards.reading.quarantine import Quarantine
from shards.reading.segments import EVALUATION_SHARE, TRAINING_SHARE, MicroBatch, Segment, cut_segments, pair_budget
from shards.reading.stream import Batch, SegmentStream
from shards.reading.watchdog import Watchdog

_NAMED = 5  # tar files in a message


class _Loader:
    """What the two loaders share: a stream, the time spent waiting for it, and its end."""

    def __init__(
        self,
        feed: Feed,
        segments: Iterator[Segment],
        device: torch.device,
        bad_samples: BadSamples | None,
        *,
        rank: int,
        drops_rows: bool,
    ) -> None:
        self._feed, self._rank = feed, rank
        quarantine = None
        if feed.data.on_bad_sample == "quarantine":
            bad = bad_samples or BadSamples(feed.dataset, feed.data.max_bad_fraction, rank=rank)
            quarantine = Quarantine(feed, bad, drops_rows=drops_rows)
        self._stream = SegmentStream(feed, segments, device, quarantine)
        self._watchdog = Watchdog(feed.data.timeout, self._awaited)
        self.data_wait = 0.0  # seconds that the caller has waited for batches; set it to 0 to start again

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return self.next_batch()

    def next_batch(self) -> Batch:
        """The next batch; StopIteration after the last.

        Raises DataError naming the sample whose image cannot be read or decoded as the index promises, or where
        samples are replaced, naming all of them when they become too many. After an error the loader is at its end.
        After `data.timeout` seconds the process ends, as watchdog.py says.
        """
        start = time.perf_counter()
        try:
            with self._watchdog:
                return self._stream.take()
        finally:
            self.data_wait += time.perf_counter() - start

    def close(self) -> None:
        """Stop the threads, free pipelines and temporary files. Harmless when repeated."""
        with self._watchdog:
            self._stream.close()
        self._watchdog.close()

    def _awaited(self) -> str:
        """One line about a wait that has lasted too long."""
        batch = self._stream.awaited
        what, tars = "a batch", "no tar"
        if batch is not None:
            what = "a batch of the evaluation" if batch.step is None else f"a batch of step {batch.step + 1}"
            names = [self._feed.dataset.paths[tar].name for tar in np.unique(self._feed.dataset.tar[batch.ids])]
            tars = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
        return (
            f"data.timeout={self._feed.data.timeout:g}: rank {self._rank} has waited so many seconds for {what}, read "
            f"from {tars} in {self._feed.dataset.folder}; see whether this storage answers, or raise data.timeout. The "
            "process ends; the stacks of its threads:"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TrainLoader(_Loader):
    """The micro-batches of one rank: step `start_step` micro-step 0, 1, ..., to the end of step `total_steps` - 1."""

    def __init__(
        self,
        dataset: Dataset,
        *,
        view: str,
        data: Data,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        masks: MaskDraws,
        device: torch.device,
        start_step: int = 0,
        total_steps: int,
        local_world_size: int = 1,
        most_pairs: int | None = None,
        check_sources: bool = False,
        bad_samples: BadSamples | None = None,
    ) -> None:
        """`masks` says what `Batch.noise` and `Batch.mask` hold. `local_world_size` ranks share this node's cores.

        `most_pairs` per segment; none: what the kernel allows. `bad_samples` is where data.on_bad_sample=quarantine
        writes down what it met; none: only to stderr.

        Raises ValueError if the batch sizes do not fit each other or the data.
        """
        self.order = GlobalOrder(dataset.tar, seed=seed, global_batch=global_batch, block_size=data.block_size)
        self.micro_steps = num_micro_steps(global_batch, micro_batch, world_size)
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step={start_step}: outside 0 ... total_steps={total_steps}; nothing to train")
        places = [micro_positions(j, micro_batch, rank, world_size) for j in range(self.micro_steps)]
        batches = (
            MicroBatch(self.order.epoch(step), self.order.global_batch_ids(step)[positions], positions, step)
            for step in range(start_step, total_steps)
            for positions in places
        )
        feed = _feed(dataset, view, data, seed, device, local_world_size, masks=masks, check_sources=check_sources)
        segments = cut_segments(batches, dataset.tar, most_pairs or pair_budget(TRAINING_SHARE))
        super().__init__(feed, segments, device, bad_samples, rank=rank, drops_rows=False)


class EvaluationLoader(_Loader):
    """Given samples, each exactly once and in the given order; the last batch is short.

    In quarantine a sample that cannot be decoded is left out, and its batch is shorter by it.
    """

    def __init__(
        self,
        dataset: Dataset,
        sample_ids: np.ndarray,
        *,
        data: Data,
        batch: int,
        device: torch.device,
        view: str = "evaluate",
        rank: int = 0,
        local_world_size: int = 1,
        most_pairs: int | None = None,
        check_sources: bool = False,
        bad_samples: BadSamples | None = None,
    ) -> None:
        """`sample_ids` [M], any order, repeats allowed. Ids in the order of the dataset are read fastest.

        `bad_samples` as for `TrainLoader`; `rank` is for messages.
        """
        ids = np.asarray(sample_ids, np.int64)
        feed = _feed(dataset, view, data, 0, device, local_world_size, masks=NO_MASK, check_sources=check_sources)
        segments = cut_segments(_filled(ids, batch), dataset.tar, most_pairs or pair_budget(EVALUATION_SHARE))
        super().__init__(feed, segments, device, bad_samples, rank=rank, drops_rows=True)

    def next_batch(self) -> Batch:
        """As `TrainLoader.next_batch`, without the rows that only fill the batch up."""
        while True:
            full = super().next_batch()
            wanted = full.positions >= 0
            count = int(wanted.sum())
            if count:
                return full.rows(slice(count) if wanted[:count].all() else wanted.nonzero()[:, 0])


def _filled(ids: np.ndarray, batch: int) -> Iterator[MicroBatch]:
    """The samples in batches that are all full, as DALI's are: the last one is filled up with its last sample."""
    for start in range(0, len(ids), batch):
        places = np.arange(start, start + batch)
        wanted = places < len(ids)
        yield MicroBatch(0, ids[np.minimum(places, len(ids) - 1)], np.where(wanted, places, -1))


def _feed(
    dataset: Dataset, view: str, data: Data, seed: int, device: torch.device, local_world_size: int, **rest: Any
) -> Feed:
    """A feed for this device; threads from data.threads, or as cores.py counts them."""
    device_id = None
    if device.type == "cuda":
        device_id = torch.cuda.current_device() if device.index is None else device.index
    threads = data.threads or decoding_threads(cores_per_rank(local_world_size), gpu=device_id is not None)
    return Feed(
        dataset=dataset, view=find_view(view), data=data, seed=seed, num_threads=threads, device_id=device_id, **rest
    )
