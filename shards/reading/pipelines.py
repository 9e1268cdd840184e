"""One segment as a DALI pipeline: reader, columns, graph.

Two streams meet in a pipeline: the bytes, which DALI's webdataset reader takes in the order of the index files written
for the segment, and the columns (ids, labels, draws, ...), which come from us through `external_source`, one micro-
batch per iteration. That they stay in step is checked: the ids of every batch against the plan, and where the bytes
came from (`source_info`) for the first batch of a segment, or for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def
from nvidia.dali.data_node import DataNode
from nvidia.dali.tensors import TensorListCPU, TensorListGPU

from shards.dataset import Dataset
from shards.reading.columns import Row, column_nodes
from shards.reading.feed import Feed
from shards.reading.sample_check import UndecodableSample, check_samples
from shards.reading.segments import MicroBatch, Segment, index_folder, write_segment
from shards.reading.suspects import find_undecodable

COLUMNS = ("labels", "ids", "noise", "mask")  # delivered beside the images; the other columns are draws

_DRAWN_TOGETHER = 512  # samples
TensorList = TensorListCPU | TensorListGPU


@dataclass(frozen=True, eq=False)
class Served:
    """One micro-batch as DALI returned it; the lists own their memory."""

    images: tuple[TensorList, ...]
    columns: dict[str, TensorList]  # those of COLUMNS that have a width
    positions: np.ndarray  # int64 [B], places in the global batch


class SegmentPipeline:
    """A built pipeline over one segment. `run` returns its micro-batches in order, as many as the segment has."""

    def __init__(self, feed: Feed, segment: Segment) -> None:
        """Write the index, build, check the first batch and keep it: the first `run` answers at once.

        Raises UndecodableSample for samples that cannot be served, another DataError for a shard that does not hold
        what its index says, and RuntimeError if DALI serves other bytes than planned.
        """
        self._feed, self._segment, self._served = feed, segment, 0
        self._columns = delivered_columns(feed.columns(segment[0]))
        ids = np.concatenate([batch.ids for batch in segment])
        check_samples(feed.dataset, ids)
        with index_folder() as folder:
            paths, indexes = write_segment(feed.dataset, ids, folder)
            self._pipeline = build_pipeline(feed, segment, paths, indexes)
            self._first: Served | None = self._take(None)  # DALI parses the index files in its first run

    @property
    def left(self) -> int:
        """How many micro-batches `run` has not returned yet."""
        return len(self._segment) - self._served + self.untouched

    @property
    def rest(self) -> Segment:
        """The micro-batches that `run` has not returned yet."""
        return self._segment[len(self._segment) - self.left :]

    @property
    def untouched(self) -> bool:
        """Whether `run` will return the first batch, which was made outside any stream of the caller's."""
        return self._first is not None

    def run(self, cuda_stream: Any = None) -> Served:
        """The next micro-batch, on `cuda_stream` if one is given, else ready. Never call it after an error.

        Raises as the constructor does.
        """
        if self._first is not None:
            served, self._first = self._first, None
            return served
        return self._take(cuda_stream)

    def _take(self, cuda_stream: Any) -> Served:
        batch, first = self._segment[self._served], self._served == 0
        try:
            ids, sources, *outputs = self._pipeline.run(cuda_stream)
        except RuntimeError as error:
            raise self._explained(error) from error
        if not np.array_equal(ids.as_array(), batch.ids):
            raise RuntimeError(f"columns out of step: ids {ids.as_array()[:8]} where {batch.ids[:8]} were planned")
        if first or self._feed.check_sources:
            check_sources(self._feed.dataset, batch.ids, sources)
        self._served += 1
        num_images = len(outputs) - len(self._columns)
        columns = dict(zip(self._columns, outputs[num_images:], strict=True))
        return Served(tuple(outputs[:num_images]), columns, batch.positions)

    def _explained(self, error: RuntimeError) -> UndecodableSample | RuntimeError:
        """Name the sample. DALI may have failed on a batch that it was preparing: those are suspects too."""
        suspects = self._segment[self._served : self._served + 1 + self._feed.data.prefetch]
        for batch in suspects:
            found = find_undecodable(self._feed, batch)
            if found:
                return UndecodableSample(self._feed.dataset, found, batch.epoch)
        first, last = suspects[0].ids[0], suspects[-1].ids[-1]
        return RuntimeError(
            f"DALI failed between {self._feed.dataset.name(first)} and {self._feed.dataset.name(last)}, though each of "
            f"these samples decodes alone; it says: {error}"
        )


def delivered_columns(columns: Iterable[str]) -> list[str]:
    """Those of COLUMNS that there are, in their order."""
    return [name for name in COLUMNS if name in columns]


def build_pipeline(feed: Feed, segment: Segment, paths: list[str], indexes: list[str]) -> Pipeline:
    """Reader, columns and graph over one segment.

    Outputs: ids and sources (both on the CPU, for the checks), the view's images, then COLUMNS on the device.
    """
    pipeline = _connected(
        feed,
        feed.columns(segment[0]),
        _column_batches(feed, segment),
        {"paths": paths, "index_paths": indexes},
        batch_size=len(segment[0].ids),
        num_threads=feed.num_threads,
        device_id=feed.device_id,
        prefetch_queue_depth=feed.data.prefetch,
        exec_dynamic=True,  # outputs own their memory, and an error belongs to the batch that caused it
    )
    pipeline.build()
    return pipeline


@pipeline_def(enable_conditionals=True)  # which rewrites this function and what it calls, so that `if` means a split
def _connected(
    feed: Feed, example: dict[str, np.ndarray], source: Iterator[Row], files: dict[str, list[str]]
) -> tuple[DataNode, ...]:
    gpu = feed.device_id is not None
    encoded = fn.readers.webdataset(
        **files,
        ext=["i"],
        missing_component_behavior="error",
        pad_last_batch=True,
        lazy_init=True,  # the index is parsed by DALI's thread: building would hold the interpreter for it
    )
    columns = column_nodes(example, source)
    images = feed.view.graph(encoded, columns, feed.data, gpu)
    delivered = [columns[name].gpu() if gpu else columns[name] for name in delivered_columns(example)]
    sources = fn.get_property(encoded, key="source_info")
    return (columns["ids"], sources, *images, *delivered)


def _column_batches(feed: Feed, segment: Segment) -> Iterator[Row]:
    """The columns of every micro-batch. It ends with the segment, so DALI prepares no batch beyond.

    Several micro-batches are drawn together, because a call of numpy costs more than what it does to a few samples:
    block-wise masks become three times cheaper. Draws belong to the sample, so this changes none.
    """
    size = len(segment[0].ids)
    together = max(1, _DRAWN_TOGETHER // size)
    for epoch, of_epoch in groupby(segment, key=lambda batch: batch.epoch):
        batches = list(of_epoch)
        for first in range(0, len(batches), together):
            part = batches[first : first + together]
            ids, positions = (np.concatenate(rows) for rows in zip(*((b.ids, b.positions) for b in part), strict=True))
            columns = feed.columns(MicroBatch(epoch, ids, positions))
            for row in range(0, len(ids), size):
                yield tuple(column[row : row + size] for column in columns.values())


def check_sources(dataset: Dataset, ids: np.ndarray, sources: TensorListCPU) -> None:
    """RuntimeError naming both places if DALI took a sample's bytes from another place than the index says."""
    for row, sample_id in enumerate(ids):
        expected = f"{dataset.paths[dataset.tar[sample_id]]}:{dataset.offset[sample_id]}:"
        served = bytes(np.asarray(sources[row])).decode()
        if served != expected:
            raise RuntimeError(
                f"{dataset.name(sample_id)}: the bytes of {served!r} were served where {expected!r} was planned "
                f"(row {row}); labels and images no longer belong together, so the run stops"
            )
