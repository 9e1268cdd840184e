"""Which sample broke a batch: DALI fails a whole batch and often does not say which of its images it was.

Each suspect goes alone through the very graph that failed, with its own draws. The draws matter: of a JPEG whose end
is lost DALI decodes a crop from its beginning without complaint. So whether a sample can be served is a function of
(epoch, sample), the same whoever asks and whenever. PIL, which survives anything, says who is asked first.
"""

from __future__ import annotations

import numpy as np
from nvidia.dali import pipeline_def
from nvidia.dali.data_node import DataNode

from shards.augment import reference
from shards.reading.columns import column_nodes
from shards.reading.feed import Feed
from shards.reading.sample_check import header_complaint
from shards.reading.segments import MicroBatch


def find_undecodable(feed: Feed, batch: MicroBatch) -> dict[int, str]:
    """Samples of a batch that cannot be served, with the reason for each in one line.

    Where PIL and DALI disagree about one sample while another is bad in the eyes of both, only the latter is found; a
    second failure of the same batch finds the other.
    """
    ids = np.unique(batch.ids).tolist()
    likely = [sample_id for sample_id in ids if pil_complaint(feed, sample_id)]
    others = [sample_id for sample_id in ids if sample_id not in likely]
    for group in (likely, others):
        found = {i: reason for i in group if (reason := complaint(feed, batch.epoch, i))}
        if found:
            return found
    return {}


def complaint(feed: Feed, epoch: int, sample_id: int) -> str | None:
    """Why this sample cannot be served in this epoch, in one line; None if it can."""
    encoded = np.frombuffer(reference.read_image(feed.dataset, sample_id), np.uint8)
    if reason := header_complaint(feed.dataset, sample_id, encoded):
        return reason
    try:
        _serve_alone(feed, epoch, sample_id, encoded)
    except RuntimeError as error:
        return pil_complaint(feed, sample_id) or _one_line(error)
    return None


def pil_complaint(feed: Feed, sample_id: int) -> str | None:
    """What PIL says of an image that it cannot decode."""
    encoded = reference.read_image(feed.dataset, sample_id)
    try:
        reference.decode(encoded)
    except Exception as error:  # PIL's plugins raise anything at all on bad bytes
        return _one_line(error)
    return None


def _serve_alone(feed: Feed, epoch: int, sample_id: int, encoded: np.ndarray) -> None:
    """RuntimeError if DALI cannot make the sample's images of this epoch."""
    alone = _graph_alone(
        feed,
        {"encoded": encoded[None], **feed.draws(epoch, np.array([sample_id]))},
        batch_size=1,
        num_threads=1,
        device_id=feed.device_id,
        prefetch_queue_depth=1,
        exec_dynamic=True,
    )
    alone.build()
    alone.run()


@pipeline_def(enable_conditionals=True)
def _graph_alone(feed: Feed, columns: dict[str, np.ndarray]) -> tuple[DataNode, ...]:
    """The view's graph over one batch, the same again and again."""
    nodes = column_nodes(columns, lambda: tuple(columns.values()))
    return feed.view.graph(nodes["encoded"], nodes, feed.data, feed.device_id is not None)


def _one_line(error: Exception) -> str:
    """The most telling line of an error; DALI's are several lines long and end in a stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "fail" in line.lower() or "error" in line.lower()]
    return (telling or lines or [type(error).__name__])[-1][:200]
