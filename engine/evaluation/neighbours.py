"""Weighted k-nearest-neighbour classification on frozen features (Wu et al., 2018; DINO, Caron et al., 2021).

Every training image votes for its class with weight exp(cosine similarity / temperature); the k most similar images
vote.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.evaluation.features import Labelled

CHUNK = 1024  # queries at a time


def knn_accuracy(bank: Labelled, queries: Labelled, *, k: int, temperature: float) -> float:
    """Share of the queries, in percent, whose class the bank's votes give."""
    num_classes = int(max(bank.labels.max(), queries.labels.max())) + 1
    predicted = knn_predict(
        F.normalize(queries.features, dim=1),
        F.normalize(bank.features, dim=1),
        bank.labels,
        k=k,
        temperature=temperature,
        num_classes=num_classes,
    )
    return 100 * (predicted == queries.labels).double().mean().item()


def knn_predict(
    queries: Tensor, bank: Tensor, bank_labels: Tensor, *, k: int, temperature: float, num_classes: int
) -> Tensor:
    """Predicted class [Q] of unit vectors `queries` [Q, D] from unit vectors `bank` [M, D]; k is capped at M."""
    predictions = []
    for chunk in queries.split(CHUNK):
        similarity, nearest = (chunk @ bank.T).topk(min(k, len(bank)), dim=1)  # [q, k]
        votes = torch.zeros(len(chunk), num_classes, device=chunk.device)
        votes.scatter_add_(1, bank_labels[nearest], (similarity / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)
