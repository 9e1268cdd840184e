"""k-NN and the fast probe against plain definitions and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.evaluation.features import Labelled, spread
from engine.evaluation.neighbours import knn_accuracy, knn_predict
from engine.evaluation.probe import L2, probe_accuracy


def clouds(seed: int, per_class: int = 30, classes: int = 4, width: int = 8, noise: float = 1.0) -> Labelled:
    """Overlapping Gaussian clouds, the same centres for every seed."""
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(0)) * 1.5
    labels = torch.arange(classes).repeat(per_class)
    shift = torch.randn(len(labels), width, generator=torch.Generator().manual_seed(seed + 1)) * noise
    return Labelled(centres[labels] + shift, labels)


def test_votes_are_weighted_by_similarity():
    """Written out for one query: two weak votes for class 1 lose against one strong vote for class 0."""
    bank = F.normalize(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8], [-1.0, 0.0]]), dim=1)
    labels = torch.tensor([0, 1, 1, 2])
    query = torch.tensor([[1.0, 0.0]])
    assert knn_predict(query, bank, labels, k=3, temperature=0.07, num_classes=3).item() == 0
    assert knn_predict(query, bank, labels, k=3, temperature=10.0, num_classes=3).item() == 1
    assert knn_predict(query, bank, labels, k=99, temperature=10.0, num_classes=3).item() == 1


def test_knn_equals_the_plain_definition():
    bank, queries = clouds(0), clouds(1)
    a, b = F.normalize(queries.features, dim=1).numpy(), F.normalize(bank.features, dim=1).numpy()
    correct = 0
    for row, label in zip(a, queries.labels, strict=True):
        similarity = b @ row
        nearest = np.argsort(-similarity)[:20]
        votes = np.zeros(4)
        for index in nearest:
            votes[bank.labels[index]] += np.exp(similarity[index] / 0.07)
        correct += int(votes.argmax() == label)
    accuracy = knn_accuracy(bank, queries, k=20, temperature=0.07)
    assert accuracy == pytest.approx(100 * correct / len(queries.labels))
    assert 30 < accuracy < 100


def test_an_image_finds_itself():
    bank = clouds(0, noise=3.0)
    assert knn_accuracy(bank, bank, k=1, temperature=0.07) == 100


def test_the_probe_is_logistic_regression():
    sklearn = pytest.importorskip("sklearn.linear_model")
    train, val = clouds(0, noise=1.5), clouds(1, noise=1.5)
    std, mean = torch.std_mean(train.features, dim=0)
    features, queries = (((part.features - mean) / std).numpy() for part in (train, val))
    # scikit-learn minimises C x sum(loss) + |w|^2 / 2; ours mean(loss) + L2 x |w|^2.
    reference = sklearn.LogisticRegression(C=1 / (2 * L2 * len(features)), max_iter=5000, tol=1e-8)
    reference.fit(features, train.labels.numpy())
    expected = 100 * (reference.predict(queries) == val.labels.numpy()).mean()
    assert probe_accuracy(train, val) == pytest.approx(expected, abs=0.9)  # one of 120
    assert 40 < expected < 100


@pytest.mark.parametrize(("number", "limit"), [(10, 3), (10, 10), (10, 99), (1, 1), (7, 6)])
def test_spread_takes_different_samples(number, limit):
    ids = spread(number, limit)
    assert len(set(ids.tolist())) == min(number, limit) and ids.min() == 0 and ids.max() < number
