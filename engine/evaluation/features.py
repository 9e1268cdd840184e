"""Features of a data set by a frozen encoder: what k-NN and probes work on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.feeding import patience
from engine.runtime import Runtime
from engine.start_up import require_labels
from recipes.schema import Recipe
from shards.dataset import Dataset
from shards.reading.bad_samples import BadSamples
from shards.reading.loader import EvaluationLoader

Encode = Callable[[Tensor], Tensor]  # images [B, 3, S, S] -> features [B, D]


class Labelled(NamedTuple):
    """Features fp32 [n, D] and labels int64 [n] of the same images, on the device."""

    features: Tensor
    labels: Tensor


def mean_token(encoder: nn.Module) -> Encode:
    """Mean of the patch tokens after the last norm: the class token of masked modelling describes nothing by itself."""
    return lambda images: encoder(images)[:, 1:].float().mean(dim=1)


def pixels(images: Tensor) -> Tensor:
    """The image itself as its feature."""
    return images.flatten(1)


def spread(num_samples: int, limit: int) -> np.ndarray:
    """At most `limit` ids of 0 .. num_samples - 1, evenly spread (shards were shuffled when they were made)."""
    return np.unique(np.linspace(0, num_samples - 1, min(limit, num_samples)).round().astype(np.int64))


def share(num_samples: int, limit: int, rank: int, world_size: int) -> np.ndarray:
    """The samples of `spread` that this rank looks at: int64 [n]; the ranks' parts, joined in their order, are all."""
    return np.array_split(spread(num_samples, limit), world_size)[rank]


@torch.no_grad()
def extract(
    encode: Encode,
    dataset: Dataset,
    limit: int,
    recipe: Recipe,
    runtime: Runtime,
    bad_samples: BadSamples | None = None,
    leave: Callable[[], bool] = lambda: False,
) -> Labelled:
    """Features of at most `limit` samples, in order, on every rank; the ranks share the work. Collective.

    Each sample counts once; those that data.on_bad_sample=quarantine leaves out are told to `bad_samples`.
    Where `leave()` is true after a batch, this rank looks at no more of its samples. ValueError where a sample has no
    label.
    """
    require_labels(dataset, str(dataset.folder))
    part = share(len(dataset), limit, runtime.rank, runtime.world_size)
    features, labels = [], []
    if len(part):
        loader = EvaluationLoader(
            dataset,
            part,
            data=replace(recipe.data, timeout=patience(recipe, runtime)),
            batch=recipe.evaluation.batch,
            device=runtime.device,
            rank=runtime.rank,
            local_world_size=runtime.local_world_size,
            bad_samples=bad_samples,
        )
        with loader, torch.autocast(runtime.device.type, torch.bfloat16, enabled=recipe.precision != "fp32"):
            for batch in loader:
                features.append(encode(batch.views[0]).float().clone())
                labels.append(batch.labels.clone())
                if leave():
                    break
    return Labelled(gather(features, runtime), gather(labels, runtime))


def gather(parts: list[Tensor], runtime: Runtime) -> Tensor:
    """The rows of all ranks, in rank order; ranks may hold different numbers of rows, or none."""
    if runtime.world_size == 1:
        return torch.cat(parts)
    gathered: list = [None] * runtime.world_size
    dist.all_gather_object(gathered, torch.cat(parts).cpu() if parts else None)
    return torch.cat([rows for rows in gathered if rows is not None]).to(runtime.device)
