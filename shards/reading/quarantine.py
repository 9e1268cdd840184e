"""Samples that cannot be served are named and replaced, and the run goes on: `data.on_bad_sample=quarantine`.

In the place of a bad sample comes the next one, by sample id and round the end, that can be served in that epoch,
with its own label and draws. This is a function of (epoch, sample) alone: every rank that meets the sample decides
the same without talking, in any batch size and after any resume, and steps and batches keep their sizes. What is
known of bad samples only says who is looked at before DALI fails on them.

In an evaluation a replacement would be counted twice: there the bad sample's row is marked as nobody's.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from shards.layout import DataError
from shards.reading.bad_samples import BadSamples
from shards.reading.feed import Feed
from shards.reading.sample_check import UndecodableSample
from shards.reading.segments import MicroBatch, Segment
from shards.reading.suspects import complaint


class Quarantine:
    """Keeps bad samples out of segments. Used by the loader's thread and by the thread that builds segments."""

    def __init__(self, feed: Feed, bad: BadSamples, *, drops_rows: bool) -> None:
        """`drops_rows`: the positions of replaced samples become -1, as an evaluation needs it."""
        self._feed, self._bad, self._drops_rows = feed, bad, drops_rows
        self._judged: dict[tuple[int, int], bool] = {}  # (epoch, sample id) -> whether it can be served

    def meet(self, error: UndecodableSample, segment: Segment) -> None:
        """Take note of the samples on which `segment` failed. DataError where they become too many."""
        steps: dict[int, int | None] = {}
        for batch in reversed(segment):  # the first one counts
            number = None if batch.step is None else batch.step + 1  # as metrics.jsonl counts
            met = np.intersect1d(batch.ids, list(error.reasons)).tolist()
            steps |= dict.fromkeys(met, number)
            if error.epoch in (None, batch.epoch):
                self._judged |= {(batch.epoch, sample_id): False for sample_id in met}
        fate = "left out of the evaluation" if self._drops_rows else "the next readable sample takes its place"
        self._bad.add(error.reasons, steps, fate)

    def cleaned(self, segment: Segment) -> Segment:
        """The segment with other samples in the place of those that are known and cannot be served."""
        known = self._bad.ids
        if not known:
            return segment
        judged = list(self._judged.items())  # at once: the other thread may add to them
        self._judged = {place: good for place, good in judged if place[0] >= segment[0].epoch}
        return tuple(self._cleaned(batch, known) for batch in segment)

    def _cleaned(self, batch: MicroBatch, known: list[int]) -> MicroBatch:
        rows = np.flatnonzero(np.isin(batch.ids, known))
        if not len(rows):
            return batch
        ids, positions = batch.ids.copy(), batch.positions.copy()
        for row in rows.tolist():
            ids[row] = self._readable_from(batch.epoch, int(ids[row]))
        if self._drops_rows:
            positions[ids != batch.ids] = -1
        return replace(batch, ids=ids, positions=positions)

    def _readable_from(self, epoch: int, sample_id: int) -> int:
        """This sample or the next that can be served in `epoch`, as far as is known."""
        number = len(self._feed.dataset)
        for candidate in range(sample_id, sample_id + number):
            if candidate % number not in self._bad or self._can_be_served(epoch, candidate % number):
                return candidate % number
        raise DataError(f"{self._feed.dataset.folder}: none of its {number} samples can be read; verify the shards")

    def _can_be_served(self, epoch: int, sample_id: int) -> bool:
        judged, place = self._judged, (epoch, sample_id)
        if place not in judged:
            judged[place] = complaint(self._feed, epoch, sample_id) is None
        return judged[place]
