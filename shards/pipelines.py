"""One segment as a DALI pipeline: reader, columns, graph.

Two streams meet in a pipeline: the bytes, which DALI's webdataset reader takes in the order of the index files written
for the segment, and the columns (ids, labels, draws, ...), which come from us through `external_source`, one micro-
batch per iteration. That they stay in step is checked: the ids of every batch against the plan, and where the bytes
came from (`source_info`) for the first batch of a segment, or for all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.tensors import TensorListCPU, TensorListGPU

from recipes.schema import Data
from shards.dataset import Dataset
from shards.draws import mask_noise
from shards.segments import MicroBatch, Segment, scratch_folder, write_segment
from shards.suspects import UndecodableSample, find_undecodable
from shards.views import View

COLUMNS = ("labels", "ids", "positions", "noise")  # delivered beside the images; the other columns are draws

_TYPES = {"int32": types.INT32, "int64": types.INT64, "float32": types.FLOAT}

TensorList = TensorListCPU | TensorListGPU


@dataclass(frozen=True, eq=False, kw_only=True)
class Feed:
    """What all pipelines of a loader share; only the segment differs."""

    dataset: Dataset
    view: View
    data: Data
    seed: int
    num_noise: int  # mask draws per sample
    num_threads: int
    device_id: int | None = None  # the GPU; none: DALI's CPU operators
    check_sources: bool = False  # compare the source of every batch with the plan, not only of a segment's first

    def columns(self, batch: MicroBatch) -> dict[str, np.ndarray]:
        """Everything about a micro-batch but its pixels, one row per sample."""
        return {
            "labels": self.dataset.label[batch.ids].astype(np.int64),
            "ids": batch.ids,
            "positions": batch.positions,
            "noise": mask_noise(self.seed, batch.epoch, batch.ids, self.num_noise),
            **self.view.drawn(self.dataset, self.data, self.seed, batch.epoch, batch.ids),
        }


@dataclass(frozen=True, eq=False)
class Served:
    """One micro-batch as DALI returned it; the lists own their memory."""

    images: tuple[TensorList, ...]
    columns: dict[str, TensorList]  # by COLUMNS


class SegmentPipeline:
    """A built pipeline over one segment. `run` returns its micro-batches in order, as many as the segment has."""

    def __init__(self, feed: Feed, segment: Segment) -> None:
        """Write the index, build, check the first batch and keep it: the first `run` answers at once.

        Raises DataError for a shard that does not hold what its index says (UndecodableSample where DALI noticed it),
        and RuntimeError if DALI serves other bytes than planned.
        """
        self._feed, self._segment, self._served = feed, segment, 0
        ids = np.concatenate([batch.ids for batch in segment])
        with tempfile.TemporaryDirectory(prefix="maskwright-index-", dir=scratch_folder()) as folder:
            paths, indexes = write_segment(feed.dataset, ids, Path(folder))
            self._pipeline = build_pipeline(feed, segment, paths, indexes)
            self._first: Served | None = self._take(None)  # DALI parses the index files in its first run

    def __len__(self) -> int:
        """Micro-batches in the segment."""
        return len(self._segment)

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
        num_images = len(outputs) - len(COLUMNS)
        columns = dict(zip(COLUMNS, outputs[num_images:], strict=True))
        return Served(tuple(outputs[:num_images]), columns)

    def _explained(self, error: RuntimeError) -> UndecodableSample | RuntimeError:
        """Name the sample. DALI may have failed on a batch that it was preparing: those are suspects too."""
        suspects = self._segment[self._served : self._served + 1 + self._feed.data.prefetch]
        for batch in suspects:
            found = find_undecodable(self._feed.dataset, batch.ids)
            if found:
                names = "; ".join(f"{self._feed.dataset.name(i)} (id {i}): {why}" for i, why in found.items())
                return UndecodableSample(
                    f"{names}. DALI cannot decode this batch; verify the shards and make or index them again "
                    "without these samples",
                    list(found),
                )
        first, last = suspects[0].ids[0], suspects[-1].ids[-1]
        return RuntimeError(
            f"DALI failed between {self._feed.dataset.name(first)} and {self._feed.dataset.name(last)}, though each of "
            f"these samples decodes alone; it says: {error}"
        )


def build_pipeline(feed: Feed, segment: Segment, paths: list[str], indexes: list[str]) -> Pipeline:
    """Reader, columns and graph over one segment.

    Outputs: ids and sources (both on the CPU, for the checks), the view's images, then COLUMNS on the device.
    """
    gpu = feed.device_id is not None
    example = feed.columns(segment[0])
    pipeline = Pipeline(
        batch_size=len(segment[0].ids),
        num_threads=feed.num_threads,
        device_id=feed.device_id,
        prefetch_queue_depth=feed.data.prefetch,
        exec_dynamic=True,  # outputs own their memory, and an error belongs to the batch that caused it
    )
    with pipeline:
        encoded = fn.readers.webdataset(
            paths=paths,
            index_paths=indexes,
            ext=["i"],
            missing_component_behavior="error",
            pad_last_batch=True,
            lazy_init=True,  # the index is parsed by DALI's thread: building would hold the interpreter for it
        )
        nodes = fn.external_source(
            source=_column_source(feed, segment),
            num_outputs=len(example),
            batch=True,
            dtype=[_TYPES[column.dtype.name] for column in example.values()],
            ndim=[column.ndim - 1 for column in example.values()],
        )
        columns = dict(zip(example, nodes, strict=True))
        images = feed.view.graph(encoded, columns, feed.data, gpu)
        delivered = [columns[name].gpu() if gpu else columns[name] for name in COLUMNS]
        sources = fn.get_property(encoded, key="source_info")
        pipeline.set_outputs(columns["ids"], sources, *images, *delivered)
    pipeline.build()
    return pipeline


def _column_source(feed: Feed, segment: Segment) -> Callable[[int], tuple[np.ndarray, ...]]:
    def columns_of(iteration: int) -> tuple[np.ndarray, ...]:
        if iteration >= len(segment):
            raise StopIteration  # so that DALI prepares no batch beyond the segment
        return tuple(feed.columns(segment[iteration]).values())

    return columns_of


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
