"""A loader whose data stop coming after some batches: `stalled_source.py FOLDER HOW SECONDS`.

HOW: `thread` (where segments are built), `library` (a call that lets go of the interpreter), `interpreter` (a call
that does not), `evaluation` (as `library`, in an evaluation), or `never`. With the environment variable RANK it is a
whole training whose rank 1 stalls: `stalled_source.py HOW ARGUMENTS OF THE TRAINING`.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from images import jpeg_bytes
from tars import make_dataset

from recipes.schema import Data
from shards.draws.masks import MaskDraws
from shards.reading import stream
from shards.reading.loader import EvaluationLoader, TrainLoader
from shards.reading.pipelines import SegmentPipeline
from shards.reading.segments import Segment

BATCHES = 5  # that come
LONG = 600  # seconds


class Stalling(SegmentPipeline):
    """A pipeline that stalls at the first segment or batch after those that come."""

    how = "never"

    def __init__(self, feed, segment: Segment) -> None:
        if self.how == "thread" and stalls(segment):
            time.sleep(LONG)
        super().__init__(feed, segment)

    def run(self, cuda_stream=None):
        if self.how != "thread" and stalls(self.rest):
            # PyDLL keeps the interpreter's lock during the call, CDLL does not.
            (ctypes.PyDLL if self.how == "interpreter" else ctypes.CDLL)(None).sleep(LONG)
        return super().run(cuda_stream)


def stalls(segment: Segment) -> bool:
    """Whether the next batch is one that does not come. Those of an evaluation have no step."""
    step = segment[0].step
    return Stalling.how == "evaluation" if step is None else Stalling.how != "evaluation" and step >= BATCHES


def stall(how: str) -> None:
    if how != "never":
        Stalling.how = how
        stream.SegmentPipeline = Stalling


def load(folder: Path, seconds: float) -> None:
    dataset = make_dataset(folder, [jpeg_bytes(seed) for seed in range(24)], per_tar=8)
    data, cpu = Data(image_size=16, threads=1, timeout=seconds), torch.device("cpu")
    if Stalling.how == "evaluation":
        with EvaluationLoader(dataset, np.arange(24), data=data, batch=4, device=cpu, rank=3) as evaluation:
            list(evaluation)
    loader = TrainLoader(
        dataset, view="pretrain_mae", data=data, seed=0, global_batch=4,
        micro_batch=4, rank=0, world_size=1, masks=MaskDraws(), device=cpu, total_steps=12,
        most_pairs=3,
    )  # fmt: skip
    with loader:
        for number, _ in enumerate(loader):
            print(f"batch {number}", flush=True)
        time.sleep(1.5 * seconds)  # nobody waits for data


if __name__ == "__main__":
    if "RANK" in os.environ:
        from engine.command_line import parse_command
        from engine.train import run

        if os.environ["RANK"] == "1":
            stall(sys.argv[1])
        run(parse_command(sys.argv[2:]))
    else:
        stall(sys.argv[2])
        load(Path(sys.argv[1]), float(sys.argv[3]))
