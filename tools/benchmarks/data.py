"""How fast the data side is, against what people would use instead.

`suite` makes its own sets: JPEGs like ImageNet's (about 500 x 375 pixels and 90 kB), as class folders, and in tars
with the members of timm/imagenet-1k-wds.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from itertools import count, cycle, islice
from pathlib import Path
from typing import BinaryIO

from tools.benchmarks.side_by_side import ROUNDS, Row, Settings, compared, interleaved

_TARS, _PER_TAR = 128, 1250  # to index: seconds of work, beside which the start of processes is little
_CLASSES, _PER_CLASS = 10, 600  # to convert, and to hash
_DISTINCT = 64  # pictures; the work does not depend on what they show
_WRITTEN = 8192  # bytes of an image that is only indexed
_NOISE = 13.0  # levels: makes them compress like photographs


def suite(settings: Settings) -> Iterator[Row]:
    """Rows of indexing, conversion and verification; sets and results lie in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="maskwright-benchmark-") as name:
        pictures, workers = make_pictures(settings.scaled(_DISTINCT)), sorted({1, settings.workers})
        tars = make_tars(Path(name) / "tars", pictures, settings.scaled(_TARS, 2), settings.scaled(_PER_TAR, 2))
        for number in workers:
            yield index_rate(tars, num_workers=number, rounds=settings.rounds)
        shutil.rmtree(tars)
        source = make_folders(Path(name) / "images", pictures, _CLASSES, settings.scaled(_PER_CLASS, 2))
        for number in workers:
            yield conversion_rate(source, num_workers=number, rounds=settings.rounds)
        yield hash_rate(_converted(source, Path(name) / "shards", 1000), rounds=settings.rounds)


def index_rate(folder: Path, *, num_workers: int = 1, rounds: int = ROUNDS) -> Row:
    """Samples per second of `index_shards` and of DALI's wds2idx on a folder of tars, by as many workers.

    Ours also checks every header, reads labels and image sizes, and writes the index of the set. The tars are only
    read; both write into a temporary folder. Several workers take some tenths of a second to start on either side:
    give them a set that takes seconds.
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
    return compared(f"indexing, {_workers(num_workers)}, against wds2idx", samples, seconds, "samples/s")


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


def conversion_rate(source: Path, *, num_workers: int = 1, rounds: int = ROUNDS) -> Row:
    """Images per second of a conversion of class folders, and of `tar` and decoding every file once, as many workers.

    Ours also lists, hashes, indexes and flushes to the disk, and starts its processes in every round. Both write into
    a temporary folder and decode by DALI on the CPU.
    """
    from shards.processes import call_each

    files = sorted(map(str, source.glob("*/*")))
    with tempfile.TemporaryDirectory(prefix="maskwright-conversion-") as name:
        out = Path(name)

        def ours() -> None:
            shutil.rmtree(out / "shards", ignore_errors=True)
            _converted(source, out / "shards", min(1000, -(-len(files) // num_workers)), num_workers)

        def theirs() -> None:
            subprocess.run(["tar", "-cf", str(out / "copy.tar"), "-C", str(source), "."], check=True)
            jobs = [(files[worker::num_workers],) for worker in range(num_workers)]
            for _, future in call_each(decode_files, jobs, num_workers):
                future.result()

        seconds = interleaved((ours, theirs), rounds)
    name = f"conversion, {_workers(num_workers)}, against tar and one decoding"
    return compared(name, len(files), seconds, "images/s")


def _converted(source: Path, out: Path, samples_per_shard: int, num_workers: int | None = None) -> Path:
    """The shards of class folders."""
    from shards.making.conversion import convert
    from shards.making.planning import Options, make_plan
    from shards.sources.class_folders import list_class_folders

    plan = make_plan(list_class_folders(source), Options(samples_per_shard=samples_per_shard))
    convert(plan, out, num_workers=num_workers)
    return out


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


def hash_rate(folder: Path, *, rounds: int = ROUNDS) -> Row:
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
    return compared(f"verification, {_workers(workers)}, against sha256sum", megabytes, seconds, "MB/s")


def _workers(number: int) -> str:
    return f"{number} worker{'s' * (number > 1)}"


def make_pictures(number: int) -> list[bytes]:
    """JPEGs of about 500 x 375 pixels and 90 kB, which compress like photographs."""
    return [make_picture(serial, _NOISE) for serial in range(number)]


def make_picture(serial: int, noise: float) -> bytes:
    """One of them: coarse colours under noise of so many levels."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(serial)
    width, height = (int(side) for side in rng.normal((500, 375), 40).clip(200, 800))
    colours = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((width, height), Image.BICUBIC)
    noisy = np.asarray(colours, np.float32) + rng.normal(0, noise, (height, width, 1)).astype(np.float32)
    stream = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def make_folders(root: Path, pictures: Sequence[bytes], classes: int, per_class: int) -> Path:
    """Class folders; returns `root`."""
    source = cycle(pictures)
    for label in range(classes):
        folder = root / f"n{label:08d}"
        folder.mkdir(parents=True)
        for number, picture in enumerate(islice(source, per_class)):
            (folder / f"{folder.name}_{number}.JPEG").write_bytes(picture)
    return root


def make_tars(root: Path, pictures: Sequence[bytes], tars: int, per_tar: int) -> Path:
    """Tars with the members of timm/imagenet-1k-wds (cls, jpg, json) as WebDataset's writer makes them; returns `root`.

    That is with the time in a pax header before every file. Of an image only the beginning is written and the rest is
    a hole: who indexes reads headers, and a hundred thousand whole images would be ten gigabytes.
    """
    root.mkdir(parents=True)
    images = cycle(pictures)
    for tar in range(tars):
        with open(root / f"imagenet1k-train-{tar:04d}.tar", "wb") as stream:
            for number in range(tar * per_tar, (tar + 1) * per_tar):
                label, key = number % 1000, f"n{number % 1000:08d}_{number}"
                about = {"filename": f"{key.partition('_')[0]}/{key}.JPEG", "label": label}
                _write_member(stream, f"{key}.cls", str(label).encode(), number)
                _write_member(stream, f"{key}.jpg", next(images), number)
                _write_member(stream, f"{key}.json", json.dumps(about).encode(), number)
            stream.write(bytes(2 * tarfile.BLOCKSIZE))
    return root


def _write_member(stream: BinaryIO, name: str, data: bytes, number: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(data), 1.7e9 + number / 1024
    stream.write(info.tobuf(tarfile.PAX_FORMAT) + data[:_WRITTEN])
    stream.seek(max(0, len(data) - _WRITTEN) + -len(data) % tarfile.BLOCKSIZE, os.SEEK_CUR)
