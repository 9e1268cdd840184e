"""Micro-batches of consecutive segments as one stream of tensors on the device.

One pipeline after the other is served (pipelines.py), and the next one is built in a thread with its first batch
decoded, so that a change of segment costs nothing. Where samples that cannot be decoded are to be replaced, a pipeline
that failed is built again from the batch on which it failed: what was delivered before stays as it was, and what comes
after, prepared ahead or not, is served anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from shards.reading.feed import Feed
from shards.reading.pipelines import SegmentPipeline, Served
from shards.reading.quarantine import Quarantine
from shards.reading.sample_check import UndecodableSample
from shards.reading.segments import MicroBatch, Segment


@dataclass(frozen=True, eq=False)
class Batch:
    """One micro-batch of one rank, on the device. B samples, image side S."""

    views: tuple[torch.Tensor, ...]  # float32 [B, 3, S, S] each, normalised
    labels: torch.Tensor  # int64 [B], -1 for none
    sample_ids: torch.Tensor  # int64 [B]
    positions: torch.Tensor  # int64 [B] on the CPU, place in the global batch (evaluation: in the given order)
    noise: torch.Tensor  # float32 [B, n] in [0, 1), from which a model makes its mask; n = 0 if it has no use for it
    mask: torch.Tensor  # bool [B, N], True = masked: the mask itself where the loader makes it, else N = 0

    def rows(self, chosen: slice | torch.Tensor) -> Batch:
        """Some of the samples: a slice of them, or int64 rows on the CPU."""
        on_device = chosen if isinstance(chosen, slice) else chosen.to(self.labels.device)
        return Batch(
            tuple(view[on_device] for view in self.views),
            self.labels[on_device],
            self.sample_ids[on_device],
            self.positions[chosen],
            self.noise[on_device],
            self.mask[on_device],
        )


class SegmentStream:
    """Micro-batches of consecutive segments; the next pipeline is built while the present one is served."""

    def __init__(
        self, feed: Feed, segments: Iterator[Segment], device: torch.device, quarantine: Quarantine | None = None
    ) -> None:
        """Without `quarantine` a sample that cannot be served ends the stream."""
        self._feed, self._segments, self._device, self._quarantine = feed, segments, device, quarantine
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="maskwright-segment")
        self._pipeline: SegmentPipeline | None = None
        self._building: Segment = ()
        self._retired: list[SegmentPipeline] = []  # freed in the thread: freeing takes a tenth of a second
        self._next: Future[SegmentPipeline | None] | None = self._builder.submit(self._build)

    def _build(self) -> SegmentPipeline | None:
        self._retired.clear()  # before the next one is built, so that two live at most
        self._building = next(self._segments, ())
        return self._opened(self._building) if self._building else None

    def _opened(self, segment: Segment) -> SegmentPipeline:
        """A pipeline over the segment, in quarantine without the samples that cannot be served."""
        while True:
            clean = self._quarantine.cleaned(segment) if self._quarantine else segment
            try:
                return SegmentPipeline(self._feed, clean)
            except UndecodableSample as error:
                self._note(error, clean)

    def _note(self, error: UndecodableSample, segment: Segment) -> None:
        """Raise the error, or put its samples into quarantine."""
        if self._quarantine is None:
            raise error
        self._quarantine.meet(error, segment)

    def take(self) -> Batch:
        """The next micro-batch; StopIteration after the last. What went wrong in the thread is raised here."""
        if self._pipeline is None or not self._pipeline.left:
            self._switch()
        try:
            return self._taken()
        except BaseException:
            self.close()  # a pipeline that has failed would go on with other samples
            raise

    def _taken(self) -> Batch:
        stream = None if self._device.type == "cpu" else torch.cuda.current_stream(self._device)
        while True:
            untouched = self._pipeline.untouched
            try:
                return _to_torch(self._pipeline.run(stream), copy=untouched and stream is not None)
            except UndecodableSample as error:
                rest = self._pipeline.rest
                self._note(error, rest)
            self._pipeline = None  # freed here, after the error that refers to it: two live at most
            self._pipeline = self._opened(rest)

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
        self._next = self._builder.submit(self._build)

    @property
    def awaited(self) -> MicroBatch | None:
        """The micro-batch that comes next, as far as is known; for messages."""
        rest = self._pipeline.rest if self._pipeline else ()
        return (rest or self._building or (None,))[0]

    def close(self) -> None:
        """Wait for the thread and free the pipelines. Afterwards the stream is at its end."""
        self._builder.shutdown(wait=True, cancel_futures=True)
        self._pipeline = self._next = None
        self._retired.clear()


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
