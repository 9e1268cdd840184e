"""Epochs of a small set, many segments each: `memory_worker.py FOLDER EPOCHS whole|damaged`.

Prints one JSON line per epoch: resident bytes, open files, threads, mappings of shards; and one after the end, with
what is left in shared memory.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from damage import no_end, no_header, no_tables
from images import jpeg_bytes
from tars import make_dataset

from recipes.schema import Data
from shards.draws.masks import MaskDraws
from shards.reading import segments
from shards.reading.loader import TrainLoader

NUM, GLOBAL, PAIRS = 120, 20, 30
SEGMENTS_PER_EPOCH = NUM / PAIRS  # about: shuffled samples are a pair each


def state(folder: Path) -> dict[str, object]:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    mapped = sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())
    own = [path.name for path in segments.SCRATCH.glob(f"*{os.getpid()}*")]
    return {
        "resident": resident,
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "mapped": mapped,
        "shared memory": own,
    }


def main(folder: Path, epochs: int, damaged: bool) -> None:
    encoded = [jpeg_bytes(seed, 200 + seed % 7, 150) for seed in range(NUM)]
    sizes = [(150, 200 + seed % 7) for seed in range(NUM)]
    for number, harm in {30: no_tables, 77: no_end, 90: no_header}.items() if damaged else ():
        encoded[number] = harm(encoded[number])
    dataset = make_dataset(folder, encoded, per_tar=16, sizes=sizes)
    data = Data(image_size=64, threads=2, on_bad_sample="quarantine", max_bad_fraction=0.1)
    print(json.dumps(state(folder)))
    loader = TrainLoader(
        dataset, view="pretrain_lut", data=data, seed=0, global_batch=GLOBAL, micro_batch=10, rank=0, world_size=1,
        masks=MaskDraws(num_noise=16), device=torch.device("cpu"), total_steps=epochs * (NUM // GLOBAL),
        most_pairs=PAIRS,
    )  # fmt: skip
    with loader:
        for number, _ in enumerate(loader, 1):
            if number % (NUM // GLOBAL * loader.micro_steps) == 0:
                print(json.dumps(state(folder)))
    print(json.dumps(state(folder)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "damaged")
