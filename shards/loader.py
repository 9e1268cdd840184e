"""Batches on the device, in an order that is known in advance.

`TrainLoader` serves the micro-batches of one rank from any step on; `EvaluationLoader` serves given samples once.
Both cut their order into segments (segments.py), serve one pipeline after the other (pipelines.py), and have the next
one built in a thread with its first batch decoded, so that a change of segment costs nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from recipes.schema import Data
from shards.dataset import Dataset
from shards.mask_draws import NO_MASK, MaskDraws
from shards.order import GlobalOrder, micro_positions, num_micro_steps
from shards.pipelines import Feed, SegmentPipeline, Served
from shards.segments import (
    EVALUATION_SHARE,
    TRAINING_SHARE,
    MicroBatch,
    Segment,
    cut_segments,
    pair_budget,
)
from shards.views import find_view


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank, on the device. B samples, image side S."""

    views: tuple[torch.Tensor, ...]  # float32 [B, 3, S, S] each, normalised
    labels: torch.Tensor  # int64 [B], -1 for none
    sample_ids: torch.Tensor  # int64 [B]
    positions: torch.Tensor  # int64 [B] on the CPU, place in the global batch (evaluation: in the given order)
    noise: torch.Tensor  # float32 [B, n] in [0, 1), from which a model makes its mask; n = 0 if it has no use for it
    mask: torch.Tensor  # bool [B, N], True = masked: the mask itself where the loader makes it, else N = 0

    def first(self, rows: int) -> Batch:
        """The first `rows` samples."""
        return Batch(
            tuple(view[:rows] for view in self.views),
            self.labels[:rows],
            self.sample_ids[:rows],
            self.positions[:rows],
            self.noise[:rows],
            self.mask[:rows],
        )


class SegmentStream:
    """Micro-batches of consecutive segments; the next pipeline is built while the present one is served."""

    def __init__(self, feed: Feed, segments: Iterator[Segment], device: torch.device) -> None:
        self._feed, self._segments, self._device = feed, segments, device
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="maskwright-segment")
        self._pipeline: SegmentPipeline | None = None
        self._left = 0  # micro-batches that the present pipeline still has
        self._retired: list[SegmentPipeline] = []  # freed in the thread: freeing takes a tenth of a second
        self._next: Future[SegmentPipeline | None] | None = self._builder.submit(self._build)

    def _build(self) -> SegmentPipeline | None:
        self._retired.clear()  # before the next one is built, so that two live at most
        segment = next(self._segments, None)
        return None if segment is None else SegmentPipeline(self._feed, segment)

    def take(self) -> Batch:
        """The next micro-batch; StopIteration after the last. What went wrong in the thread is raised here."""
        fresh = self._left == 0
        if fresh:
            self._switch()
        try:
            stream = None if self._device.type == "cpu" else torch.cuda.current_stream(self._device)
            served = self._pipeline.run(stream)
        except BaseException:
            self.close()  # a pipeline that has failed would go on with other samples
            raise
        self._left -= 1
        return _to_torch(served, copy=fresh and stream is not None)

    def _switch(self) -> None:
        """Serve the next pipeline, and have the one after it built."""
        if self._next is None:
            raise StopIteration
        if self._pipeline is not None:
            self._retired.append(self._pipeline)
        try:
            self._pipeline = self._next.result()
        except BaseException:
            self.close()
            raise
        if self._pipeline is None:
            self.close()
            raise StopIteration
        self._left = len(self._pipeline)
        self._next = self._builder.submit(self._build)

    def close(self) -> None:
        """Wait for the thread and free the pipelines. Afterwards the stream is at its end."""
        self._builder.shutdown(wait=True, cancel_futures=True)
        self._pipeline = self._next = None
        self._retired.clear()
        self._left = 0


def _to_torch(served: Served, copy: bool) -> Batch:
    """DALI's memory as tensors, not copied: each keeps its memory alive until it is dropped.

    `copy` is for a GPU batch made outside the caller's stream (the first of a segment, made in the thread): DALI
    would reuse its memory while kernels of that stream still read it.
    """
    views = tuple(torch.from_dlpack(images.as_tensor()) for images in served.images)
    columns = {name: torch.from_dlpack(column.as_tensor()) for name, column in served.columns.items()}
    if copy:
        views = tuple(view.clone() for view in views)
        columns = {name: column.clone() for name, column in columns.items()}
        torch.cuda.current_stream(columns["ids"].device).synchronize()
    positions = torch.from_numpy(served.positions)  # the host decides by them: read back, it would wait for the device
    ids = columns["ids"]
    nothing = torch.empty(len(ids), 0, device=ids.device)
    noise, mask = columns.get("noise", nothing), columns.get("mask", nothing.bool())
    return Batch(views, columns["labels"], ids, positions, noise, mask)


class _Loader:
    """What the two loaders share: a stream, the time spent waiting for it, and its end."""

    def __init__(self, feed: Feed, segments: Iterator[Segment], device: torch.device) -> None:
        self._stream = SegmentStream(feed, segments, device)
        self.data_wait = 0.0  # seconds that the caller has waited for batches; set it to 0 to start again

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        return self.next_batch()

    def next_batch(self) -> Batch:
        """The next batch; StopIteration after the last.

        Raises DataError naming the sample whose image cannot be read or decoded as the index promises. After an error
        the loader is at its end.
        """
        start = time.perf_counter()
        try:
            return self._stream.take()
        finally:
            self.data_wait += time.perf_counter() - start

    def close(self) -> None:
        """Stop the thread, free pipelines and temporary files. Harmless when repeated."""
        self._stream.close()

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
    ) -> None:
        """`masks` says what `Batch.noise` and `Batch.mask` hold. `local_world_size` ranks share this node's cores.

        `most_pairs` per segment; none: what the kernel allows.

        Raises ValueError if the batch sizes do not fit each other or the data.
        """
        self.order = GlobalOrder(dataset.tar, seed=seed, global_batch=global_batch, block_size=data.block_size)
        self.micro_steps = num_micro_steps(global_batch, micro_batch, world_size)
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step={start_step}: outside 0 ... total_steps={total_steps}; nothing to train")
        places = [micro_positions(j, micro_batch, rank, world_size) for j in range(self.micro_steps)]
        batches = (
            MicroBatch(self.order.epoch(step), self.order.global_batch_ids(step)[positions], positions)
            for step in range(start_step, total_steps)
            for positions in places
        )
        feed = _feed(dataset, view, data, seed, device, local_world_size, masks=masks, check_sources=check_sources)
        segments = cut_segments(batches, dataset.tar, most_pairs or pair_budget(TRAINING_SHARE))
        super().__init__(feed, segments, device)


class EvaluationLoader(_Loader):
    """Given samples, each exactly once and in the given order; the last batch is short."""

    def __init__(
        self,
        dataset: Dataset,
        sample_ids: np.ndarray,
        *,
        data: Data,
        batch: int,
        device: torch.device,
        view: str = "evaluate",
        local_world_size: int = 1,
        most_pairs: int | None = None,
        check_sources: bool = False,
    ) -> None:
        """`sample_ids` [M], any order, repeats allowed. Ids in the order of the dataset are read fastest."""
        ids = np.asarray(sample_ids, np.int64)
        self._left = len(ids)
        # DALI's batches are all full: the last sample is repeated, and the repeats are dropped by count.
        rows = (np.arange(start, start + batch) for start in range(0, len(ids), batch))
        batches = (MicroBatch(0, ids[np.minimum(row, len(ids) - 1)], row) for row in rows)
        feed = _feed(dataset, view, data, 0, device, local_world_size, masks=NO_MASK, check_sources=check_sources)
        segments = cut_segments(batches, dataset.tar, most_pairs or pair_budget(EVALUATION_SHARE))
        super().__init__(feed, segments, device)

    def next_batch(self) -> Batch:
        """As `TrainLoader.next_batch`; the last batch has only the samples that are left."""
        full = super().next_batch()
        rows = min(self._left, len(full.labels))
        self._left -= rows
        return full.first(rows)


def _feed(
    dataset: Dataset, view: str, data: Data, seed: int, device: torch.device, local_world_size: int, **rest: Any
) -> Feed:
    """A feed for this device; threads from data.threads, or this rank's part of the node's cores."""
    device_id = None
    if device.type == "cuda":
        device_id = torch.cuda.current_device() if device.index is None else device.index
    threads = data.threads or max(1, len(os.sched_getaffinity(0)) // local_world_size)
    return Feed(
        dataset=dataset, view=find_view(view), data=data, seed=seed, num_threads=threads, device_id=device_id, **rest
    )
