"""Which sample broke a batch: DALI fails a whole batch and often does not say which of its images it was.

Each suspect is decoded alone, first by PIL, which survives anything, then by DALI's own decoder for the formats that
only PIL knows. Training never goes on with a pipeline that has failed: it would deliver other samples without a word.
"""

from __future__ import annotations

import numpy as np
from nvidia.dali import Pipeline, fn, types

from shards import reference
from shards.dataset import Dataset
from shards.layout import DataError


class UndecodableSample(DataError):
    """Samples whose image could not be read or decoded as the index promises; `sample_ids` names them."""

    def __init__(self, message: str, sample_ids: list[int]) -> None:
        super().__init__(message)
        self.sample_ids = sample_ids


def find_undecodable(dataset: Dataset, ids: np.ndarray) -> dict[int, str]:
    """Of these samples those that cannot be read or decoded, or are not of the size that the index says.

    Returns the reason for each, in one line.
    """
    ids = np.unique(ids)
    found = {int(i): reason for i in ids if (reason := _pil_complaint(dataset, i))}
    return found or {int(i): reason for i in ids if (reason := _dali_complaint(dataset, i))}


def _pil_complaint(dataset: Dataset, sample_id: int) -> str | None:
    try:
        width, height = reference.decode(reference.read_image(dataset, sample_id)).size
    except Exception as error:  # PIL's plugins raise anything at all on bad bytes
        return _one_line(error)
    promised = (dataset.height[sample_id], dataset.width[sample_id])
    if (height, width) != promised:
        return f"{height} x {width} pixels where the index says {promised[0]} x {promised[1]} (height x width)"
    return None


def _dali_complaint(dataset: Dataset, sample_id: int) -> str | None:
    encoded = np.frombuffer(reference.read_image(dataset, sample_id), np.uint8)
    alone = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with alone:
        source = fn.external_source(source=lambda: [encoded], dtype=types.UINT8, ndim=1)
        alone.set_outputs(fn.decoders.image(source, device="cpu", output_type=types.RGB))
    try:
        alone.run()
    except RuntimeError as error:
        return _one_line(error)
    return None


def _one_line(error: Exception) -> str:
    """The most telling line of an error; DALI's are several lines long and end in a stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "fail" in line.lower() or "error" in line.lower()]
    return (telling or lines or [type(error).__name__])[-1][:200]
