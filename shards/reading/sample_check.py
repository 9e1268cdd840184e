"""Is there an image where the index says? Asked of every sample of a segment before DALI reads it.

A shard can be damaged or exchanged after it was indexed, and DALI's CPU decoder crashes when it meets bytes whose
header it cannot parse (10 of 36 processes; never on damage behind the header). So each header goes through the same
parser first: nvImageCodec's own, called from here, where its error is an exception. It takes 3 microseconds and looks
at the beginning of a JPEG only, which is the page that DALI reads next.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from nvidia import nvimgcodec

from shards.dataset import Dataset
from shards.layout import TAR_BLOCK, DataError
from shards.making.screening import Rejected, image_kind

_HEAD = 32  # bytes at an image's beginning that tell its format
_PAGE = 4096  # bytes, in which most headers lie
_READERS = 8  # threads, for storage that answers slowly


class UndecodableSample(DataError):
    """Samples whose image cannot be read or decoded as the index promises; `reasons` by sample id, each one line.

    `epoch` is the one in which they cannot be served, None: in any.
    """

    def __init__(self, dataset: Dataset, reasons: dict[int, str], epoch: int | None = None) -> None:
        super().__init__(
            f"{named(dataset, reasons)}. Verify the shards, and make or index them again without these samples; "
            "data.on_bad_sample=quarantine goes on without them"
        )
        self.reasons, self.epoch = reasons, epoch


def check_samples(dataset: Dataset, ids: np.ndarray) -> None:
    """Every sample lies inside its tar, and an image of the size that the index says begins there.

    Raises DataError for a tar that is missing or shorter than its index says, else UndecodableSample with all samples
    that are no image, or another one.
    """
    tars = np.unique(dataset.tar[ids])
    reasons: dict[int, str] = {}
    with ThreadPoolExecutor(_READERS) as pool:
        for found in pool.map(lambda tar: _check_in_tar(dataset, int(tar), ids[dataset.tar[ids] == tar]), tars):
            reasons |= found
    if reasons:
        raise UndecodableSample(dataset, reasons)


def named(dataset: Dataset, reasons: Mapping[int, str], most: int = 5) -> str:
    """Samples and what is wrong with them, for messages; of more than `most` the number."""
    first = [f"{dataset.name(i)} (id {i}): {reasons[i]}" for i in sorted(reasons)[:most]]
    return "; ".join(first) + (f"; and {len(reasons) - most:,} more" if len(reasons) > most else "")


def _check_in_tar(dataset: Dataset, tar: int, ids: np.ndarray) -> dict[int, str]:
    """What is wrong with samples of one tar."""
    try:
        file = open(dataset.paths[tar], "rb")
    except OSError as error:
        raise DataError(f"{dataset.paths[tar]}: {error.strerror}; restore the shard or index again") from error
    with file:
        held = os.fstat(file.fileno()).st_size
        offset, size = dataset.offset[ids], dataset.size[ids]
        outside = (offset < 0) | (size <= 0) | (offset > held - size) | (offset % TAR_BLOCK != 0)
        if outside.any():
            bad = ids[outside.argmax()]
            raise DataError(
                f"{dataset.name(bad)}: the index says {dataset.size[bad]} bytes at offset {dataset.offset[bad]}, but "
                f"the tar holds {held} bytes and members begin at multiples of {TAR_BLOCK}; index the shards again"
            )
        content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        reasons = {}
        for sample_id, start, length in zip(ids.tolist(), offset.tolist(), size.tolist(), strict=True):
            # This waits for storage without holding the interpreter, and finds the end of a file that is being cut.
            if len(os.pread(file.fileno(), min(length, _PAGE), start)) < min(length, _PAGE):
                raise DataError(f"{dataset.name(sample_id)}: its tar got shorter while it was read; restore the shard")
            complaint = header_complaint(dataset, sample_id, content[start : start + length])
            if complaint:
                reasons[sample_id] = complaint
    return reasons


def header_complaint(dataset: Dataset, sample_id: int, encoded: np.ndarray) -> str | None:
    """Why DALI must not see these bytes, uint8 [n], as the image of that sample; None if it may."""
    start = dataset.offset[sample_id]
    try:
        image_kind(encoded[:_HEAD].tobytes())
        header = nvimgcodec.CodeStream(encoded)
        found = (header.height, header.width)  # parsed only now
    except Rejected as rejected:
        return f"no image begins at offset {start}: {rejected}"
    except RuntimeError:
        return f"the header of the image at offset {start} is damaged"
    promised = (int(dataset.height[sample_id]), int(dataset.width[sample_id]))
    if found != promised:
        return f"{found[0]} x {found[1]} pixels where the index says {promised[0]} x {promised[1]} (height x width)"
    return None
