"""How far DALI's images are from PIL's, on the same draws of the same samples: for doctors and checks.

The samples are made on the spot: smooth pictures of several sizes as JPEGs, converted and opened as any data set.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from recipes.schema import Data
from shards.augment.views import find_view
from shards.dataset import Dataset, open_dataset
from shards.draws.masks import NO_MASK
from shards.making.conversion import convert
from shards.making.planning import Options, make_plan
from shards.reading.loader import TrainLoader
from shards.sources.class_folders import list_class_folders

CLASSES = 4
GRID = 9  # coarse random colours across a picture


def make_pictures(folder: Path, count: int, sides: tuple[int, int], num_workers: int = 1) -> Dataset:
    """`count` smooth JPEGs with sides between `sides` pixels, converted into shards below `folder`."""
    rng = np.random.default_rng(0)
    for number in range(count):
        width, height = (int(side) for side in rng.integers(*sides, size=2))
        grid = Image.fromarray(rng.integers(0, 256, size=(GRID, GRID, 3), dtype=np.uint8))
        path = folder / "images" / f"class_{number % CLASSES}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        grid.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=92)
    plan = make_plan(list_class_folders(folder / "images"), Options(samples_per_shard=max(1, count // 4)))
    convert(plan, folder / "shards", num_workers=num_workers)
    return open_dataset(folder / "shards")


def dali_images(dataset: Dataset, view: str, data: Data, device: torch.device) -> tuple[np.ndarray, list[np.ndarray]]:
    """Ids [n] of all samples and what DALI on `device` makes of them: float32 [n, 3, S, S] each, in levels of 255."""
    count = len(dataset)
    with TrainLoader(
        dataset, view=view, data=data, seed=0, global_batch=count, micro_batch=count, rank=0, world_size=1,
        masks=NO_MASK, device=device, total_steps=1,
    ) as loader:  # fmt: skip
        batch = loader.next_batch()
        images = [in_levels(view_images.cpu().numpy(), data) for view_images in batch.views]
        return batch.sample_ids.cpu().numpy(), images


def pil_images(dataset: Dataset, view: str, data: Data, ids: np.ndarray) -> list[np.ndarray]:
    """What PIL makes of the same samples on the same draws."""
    return [in_levels(images, data) for images in find_view(view).referenced(dataset, data, 0, 0, ids)]


def in_levels(images: np.ndarray, data: Data) -> np.ndarray:
    """Normalised images as levels 0 ... 255."""
    mean, std = (np.float32(values).reshape(3, 1, 1) for values in (data.mean, data.std))
    return (images * std + mean) * 255


def mean_difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Mean absolute difference over all images of a view, in levels of 255."""
    return float(np.mean([np.abs(a - b).mean() for a, b in zip(ours, theirs, strict=True)]))
