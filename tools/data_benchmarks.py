"""How fast the data side is, against what people would use instead: both in one process tree, turn by turn."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

ROUNDS = 5


def index_rate(folder: Path, *, num_workers: int = 1, rounds: int = ROUNDS) -> dict[str, str | float]:
    """Samples per second of `index_shards` and of DALI's wds2idx on a folder of tars, by as many workers.

    Ours also checks every header, reads labels and image sizes, and writes the index of the set. The tars are only
    read; both write into a temporary folder. DALI's tool starts two `tar` programs beside each of its own processes.
    Several workers take about 0.1 s to start on either side: give them a set that takes seconds.
    """
    from shards.foreign.index_files import find_tars
    from shards.foreign.indexing import index_shards
    from shards.processes import call_each

    tars = find_tars(folder)
    with tempfile.TemporaryDirectory(prefix="maskwright-index-") as name:
        jobs = [(str(tar), f"{name}/{tar.name}.idx") for tar in tars]
        fresh = (linked(tars, Path(name) / str(number)) for number in count())

        def theirs() -> None:
            for _, future in call_each(wds2idx, jobs, num_workers):
                future.result()

        works = (lambda: index_shards(next(fresh), num_workers=num_workers, max_bad_fraction=1.0)), theirs
        samples = index_shards(next(fresh), max_bad_fraction=1.0).index.samples
        seconds = interleaved(works, rounds)
    rates = [samples / spent for spent in seconds]
    return {
        "name": f"indexing, {num_workers} worker{'s' * (num_workers > 1)}, against wds2idx",
        "ours": rates[0],
        "theirs": rates[1],
        "ratio": rates[0] / rates[1],
        "unit": "samples/s",
    }


def linked(tars: Sequence[Path], folder: Path) -> Path:
    """A new folder with links to the tars: an index that lies in it is gone with it."""
    folder.mkdir()
    for tar in tars:
        (folder / tar.name).symlink_to(tar.resolve())
    return folder


def wds2idx(tar: str, index: str) -> None:
    """DALI's index of one tar, by the class behind its console script."""
    from wds2idx import IndexCreator

    creator = IndexCreator(tar, index, verbose=False)
    creator.create_index()
    creator.close()


def conversion_rate(source: Path, *, num_workers: int = 1, rounds: int = ROUNDS) -> dict[str, str | float]:
    """Images per second of a conversion of class folders, and of `tar` and decoding every file once, as many workers.

    Ours also lists, hashes, indexes and flushes to the disk, and starts its processes in every round. Both write into
    a temporary folder and decode by DALI on the CPU.
    """
    from shards.making.conversion import convert
    from shards.making.planning import Options, make_plan
    from shards.processes import call_each
    from shards.sources.class_folders import list_class_folders

    files = sorted(map(str, source.glob("*/*")))
    with tempfile.TemporaryDirectory(prefix="maskwright-conversion-") as name:
        out = Path(name)

        def ours() -> int:
            shutil.rmtree(out / "shards", ignore_errors=True)
            parts = -(-len(files) // num_workers)
            plan = make_plan(list_class_folders(source), Options(samples_per_shard=min(1000, parts)))
            return convert(plan, out / "shards", num_workers=num_workers).written

        def theirs() -> None:
            subprocess.run(["tar", "-cf", str(out / "copy.tar"), "-C", str(source), "."], check=True)
            jobs = [(files[worker::num_workers],) for worker in range(num_workers)]
            for _, future in call_each(decode_files, jobs, num_workers):
                future.result()

        images = ours()
        seconds = interleaved((ours, theirs), rounds)
    return _compared(f"conversion, {_workers(num_workers)}, against tar and one decoding", images, seconds, "images/s")


def decode_files(files: list[str]) -> None:
    """Decode images by DALI on the CPU, one thread, in batches of 64."""
    import numpy as np
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=64, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def decode() -> object:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB)

    pipeline = decode()
    pipeline.build()
    for first in range(0, len(files), 64):
        pipeline.feed_input("encoded", [np.fromfile(file, np.uint8) for file in files[first : first + 64]])
        pipeline.run()


def hash_rate(folder: Path, *, rounds: int = ROUNDS) -> dict[str, str | float]:
    """Megabytes per second of `verify` and of sha256sum on the same files, as many processes as ours has threads.

    Ours also reads every header and compares both indexes and the manifest.
    """
    from shards.checking.verify import HASHING_THREADS, verify

    files = sorted(path for path in folder.iterdir() if path.is_file())
    workers = min(HASHING_THREADS, os.cpu_count() or 1)
    names = b"\0".join(os.fsencode(file) for file in files)

    def ours() -> None:
        if verify(folder):
            raise RuntimeError(f"{folder}: has findings; run tools/verify_shards.py")

    def theirs() -> None:
        command = ["xargs", "-0", "-n", "8", "-P", str(workers), "sha256sum"]
        subprocess.run(command, input=names, stdout=subprocess.DEVNULL, check=True)

    megabytes = sum(file.stat().st_size for file in files) / 1e6
    seconds = interleaved((ours, theirs), rounds)
    return _compared(f"verification, {_workers(workers)}, against sha256sum", megabytes, seconds, "MB/s")


def _workers(number: int) -> str:
    return f"{number} worker{'s' * (number > 1)}"


def _compared(name: str, amount: float, seconds: list[float], unit: str) -> dict[str, str | float]:
    ours, theirs = (amount / spent for spent in seconds)
    return {"name": name, "ours": ours, "theirs": theirs, "ratio": ours / theirs, "unit": unit}


def interleaved(works: tuple[Callable[[], object], ...], rounds: int) -> list[float]:
    """Median seconds of each, one after the other in every round; the first round is not counted."""
    spent: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for work, seconds in zip(works, spent, strict=True):
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds[1:]) for seconds in spent]
