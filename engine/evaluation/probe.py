"""A fast linear probe: logistic regression on cached features.

Not MAE's protocol (90 epochs of LARS on augmented images), and not to be put into one table with it: this one takes
seconds and says how much of the classes can be read off the features linearly.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.evaluation.features import Labelled

L2 = 1e-3  # weight of the squared weights in the mean loss
ITERATIONS = 200  # of L-BFGS, at most


def probe_accuracy(train: Labelled, val: Labelled) -> float:
    """Top-1 accuracy on `val` in percent of a linear classifier fitted to `train`, features standardised by `train`."""
    std, mean = torch.std_mean(train.features, dim=0)
    features, queries = ((part.features - mean) / (std + 1e-6) for part in (train, val))
    num_classes = int(max(train.labels.max(), val.labels.max())) + 1
    weight = torch.zeros(num_classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(num_classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(F.linear(features, weight, bias), train.labels) + L2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        predicted = F.linear(queries, weight, bias).argmax(dim=1)
    return 100 * (predicted == val.labels).double().mean().item()
