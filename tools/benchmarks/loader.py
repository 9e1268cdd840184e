"""How many images a second of processor time yields, against what other people would load them with.

A loader that shares its machine with a model is as good as it is cheap, and seconds on the wall say little where other
work runs: what counts is the processor time of this process, of its threads (DALI's among them) and of its children.
The images lie in shards that the project's own converter has made, as ImageNet has them (about 500 x 375 pixels and
90 kB) and with the shorter side at 256 pixels. A round is all of them once, the start of the loader included.
"""

from __future__ import annotations

import io
import resource
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from recipes import registry
from shards.augment.parity import in_levels
from shards.dataset import Dataset, open_dataset
from shards.draws.masks import NO_MASK
from shards.making.conversion import convert
from shards.making.planning import Options, make_plan
from shards.reading.loader import EvaluationLoader, TrainLoader
from shards.reading.stream import Batch
from shards.sources.class_folders import list_class_folders
from tools.benchmarks.data import make_folders, make_pictures
from tools.benchmarks.peers import Task, peers
from tools.benchmarks.side_by_side import Row, Settings, compared, interleaved

# view: the recipe whose data section it is run with, and the mean difference that is allowed, in levels of 255.
# Colours are cut to 8 bits at other places, and a tensor's jitter rounds otherwise than PIL's.
VIEWS = {
    "evaluate": ("vit_b_mae", 0.6),
    "pretrain_mae": ("vit_b_mae", 0.6),
    "pretrain_dtm": ("vit_b_dtm", 2.0),
    "pretrain_lut": ("vit_b_lut", 2.0),
}
_CLASSES, _PER_CLASS = 8, 64
_DISTINCT = 64  # pictures
_BATCH = 64
_SHORTER = 256  # pixels


def suite(settings: Settings) -> Iterator[Row]:
    """A row for each set, view and peer; the sets lie in a temporary folder."""
    torch.set_num_threads(1)
    pictures = make_pictures(settings.scaled(_DISTINCT, 2))
    sets = {"original": pictures, f"shorter side {_SHORTER}": [shrunk(picture, _SHORTER) for picture in pictures]}
    for title, encoded in sets.items():
        with tempfile.TemporaryDirectory(prefix="maskwright-loader-") as name:
            dataset = make_set(Path(name), encoded, settings.scaled(_PER_CLASS, 2))
            for view in VIEWS:
                yield from view_rates(dataset, view, f"{view}, {title}", settings.rounds)


def make_set(folder: Path, pictures: Sequence[bytes], per_class: int) -> Dataset:
    """Shards of these pictures, each used as often as need be."""
    source = list_class_folders(make_folders(folder / "images", pictures, _CLASSES, per_class))
    convert(make_plan(source, Options(samples_per_shard=2 * per_class)), folder / "shards", num_workers=1)
    return open_dataset(folder / "shards")


def shrunk(picture: bytes, shorter: int) -> bytes:
    """A JPEG with its shorter side at so many pixels, of quality 90."""
    image, stream = Image.open(io.BytesIO(picture)), io.BytesIO()
    size = [max(1, round(side * shorter / min(image.size))) for side in image.size]
    image.resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def view_rates(dataset: Dataset, view: str, title: str, rounds: int) -> Iterator[Row]:
    """Images per second of processor time against every peer, all in one interleaved run.

    RuntimeError where a peer makes other images than ours.
    """
    recipe, most = VIEWS[view]
    data = replace(registry.load(recipe).data, threads=1)
    task = Task.of(dataset, view, data, min(_BATCH, len(dataset)))
    others = peers()
    ours = images_of(our_batches(task), task)
    for name, peer in others.items():
        require_equal(ours, images_of(peer(task), task), f"{title}: ours and {name}", most)
    works: list[Callable[[], object]] = [lambda: exhaust(our_batches(task))]
    works += [lambda peer=peer: exhaust(peer(task)) for peer in others.values()]
    spent = interleaved(works, rounds, cpu_seconds)
    for name, seconds in zip(others, spent[1:], strict=True):
        yield compared(f"{title}, against {name}", len(dataset), [spent[0], seconds], "images/CPU s")


def our_batches(task: Task) -> Iterator[list[torch.Tensor]]:
    """Ids and images of every sample once, through DALI."""
    cpu, count = torch.device("cpu"), len(task.dataset)
    loader: Iterable[Batch]
    if task.view == "evaluate":
        loader = EvaluationLoader(task.dataset, np.arange(count), data=task.data, batch=task.batch, device=cpu)
    else:
        loader = TrainLoader(
            task.dataset, view=task.view, data=task.data, seed=0, global_batch=task.batch, micro_batch=task.batch,
            rank=0, world_size=1, masks=NO_MASK, device=cpu, total_steps=count // task.batch,
        )  # fmt: skip
    with loader:
        for batch in loader:
            yield [batch.sample_ids, *batch.views]


def images_of(batches: Iterable[Sequence[torch.Tensor]], task: Task) -> dict[int, list[np.ndarray]]:
    """The images of every sample by its id, in levels of 255."""
    found = {}
    for ids, *views in batches:
        levels = [in_levels(images.numpy(), task.data) for images in views]
        found.update({number: [images[row] for images in levels] for row, number in enumerate(ids.tolist())})
    return found


def require_equal(
    ours: dict[int, list[np.ndarray]], theirs: dict[int, list[np.ndarray]], what: str, most: float
) -> None:
    """RuntimeError unless both made the same samples, alike within `most` levels on average."""
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"{what}: {len(ours)} and {len(theirs)} samples, which should be the same")
    for number, images in ours.items():
        for place, (one, other) in enumerate(zip(images, theirs[number], strict=True)):
            difference = float(np.abs(one - other).mean())
            if not difference <= most:
                raise RuntimeError(
                    f"{what}: image {place} of sample {number} differs by {difference:.2f} levels of 255 on average, "
                    f"{most:g} allowed; they do not do the same, so their times cannot be compared"
                )


def exhaust(batches: Iterable[object]) -> None:
    for _ in batches:
        pass


def cpu_seconds() -> float:
    """Processor time of this process with its threads, and of the children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)
