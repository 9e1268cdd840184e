"""Weighted k-nearest-neighbour classification on frozen features (Wu et al., 2018; DINO, Caron et al., 2021).

Every training image kept in the bank votes for its class with weight exp(cosine similarity / temperature); the k most
similar images vote. Features are the mean of the patch tokens after the last norm: the class token of masked image
modelling is not trained to describe the image.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from engine.runtime import Runtime
from recipes.schema import Recipe
from shards.dataset import Dataset
from shards.loader import EvaluationLoader


def spread(num_samples: int, limit: int) -> np.ndarray:
    """At most `limit` ids of 0 .. num_samples - 1, evenly spread (shards were shuffled when they were made)."""
    return np.unique(np.linspace(0, num_samples - 1, min(limit, num_samples)).round().astype(np.int64))


def pooled_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """Mean patch token after the last norm, of length 1: [B, 3, S, S] -> [B, D] in fp32."""
    return F.normalize(encoder(images)[:, 1:].float().mean(dim=1), dim=1)


@torch.no_grad()
def extract(
    encoder: nn.Module, dataset: Dataset, ids: np.ndarray, recipe: Recipe, runtime: Runtime
) -> tuple[Tensor, Tensor]:
    """Features [n, D] and labels [n] of this rank's part of `ids`."""
    part = np.array_split(ids, runtime.world_size)[runtime.rank]
    features, labels = [torch.empty(0, recipe.model.embed_dim)], [torch.empty(0, dtype=torch.int64)]
    if len(part):
        loader = EvaluationLoader(dataset, part, data=recipe.data, batch=recipe.evaluation.batch, device=runtime.device)
        for batch in loader:
            with torch.autocast(runtime.device.type, torch.bfloat16, enabled=recipe.precision != "fp32"):
                features.append(pooled_features(encoder, batch.views[0]).cpu())
            labels.append(batch.labels.cpu())
    return torch.cat(features).to(runtime.device), torch.cat(labels).to(runtime.device)


def gather(parts: Tensor, runtime: Runtime) -> Tensor:
    """The rows of all ranks, in rank order; ranks may hold different numbers of rows."""
    if runtime.world_size == 1:
        return parts
    counts = [torch.zeros(1, dtype=torch.int64, device=parts.device) for _ in range(runtime.world_size)]
    dist.all_gather(counts, torch.tensor([len(parts)], device=parts.device))
    longest = int(max(counts))
    padded = torch.cat([parts, parts.new_zeros(longest - len(parts), *parts.shape[1:])])
    gathered = [torch.empty_like(padded) for _ in range(runtime.world_size)]
    dist.all_gather(gathered, padded)
    return torch.cat([rows[: int(count)] for rows, count in zip(gathered, counts, strict=True)])


def knn_predict(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, *, k: int, temperature: float, num_classes: int
) -> Tensor:
    """Predicted class [Q] of unit vectors `queries` [Q, D] from unit vectors `bank` [M, D]; k is capped at M."""
    predictions = []
    for chunk in queries.split(1024):
        similarity, nearest = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)  # [q, k]
        votes = torch.zeros(len(chunk), num_classes, device=chunk.device)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(encoder: nn.Module, train: Dataset, val: Dataset, recipe: Recipe, runtime: Runtime) -> float:
    """Top-1 accuracy in percent of `val` (at most evaluation.knn_val_samples) by a bank from `train`. Collective."""
    settings = recipe.evaluation
    bank, bank_labels = (
        gather(rows, runtime)
        for rows in extract(encoder, train, spread(len(train), settings.knn_train_samples), recipe, runtime)
    )
    queries, labels = extract(encoder, val, spread(len(val), settings.knn_val_samples), recipe, runtime)
    correct = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    if len(queries):
        predicted = knn_predict(
            queries,
            bank,
            bank_labels,
            k=settings.knn_k,
            temperature=settings.knn_temperature,
            num_classes=len(train.classes),
        )
        correct[0], correct[1] = (predicted == labels).sum(), len(labels)
    if runtime.world_size > 1:
        dist.all_reduce(correct)
    return 100 * (correct[0] / correct[1]).item()
