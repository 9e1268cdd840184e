"""How long a conversion will take and how large its shards will be, from converting a few of its images for real."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from shards.making.planning import Plan, ShardPlan
from shards.making.screener import kept_screener
from shards.making.writer import make_shard

SAMPLE = 64  # images


class Estimate(NamedTuple):
    """What the whole plan will take if all of it is like the sample."""

    sampled: int  # images that were converted for this
    rejected: int  # of these
    seconds: float  # with all workers at once, each as fast as one alone
    bytes: int  # of all tars


def estimate(plan: Plan, num_workers: int) -> Estimate:
    """Convert `SAMPLE` images spread over the plan into a temporary folder, and scale up."""
    items = [item for part in plan.shards for item in part.items]
    number = min(SAMPLE, len(items))
    chosen = tuple(items[place * len(items) // number] for place in range(number))
    kept_screener()  # its start is not an image's
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        result = make_shard(plan.listing.root, Path(folder), ShardPlan(0, chosen, plan.options))
        seconds = time.monotonic() - began
    times = len(items) / number
    size = result.record.bytes if result.record else 0
    return Estimate(number, len(result.rejected), seconds * times / num_workers, round(size * times))
