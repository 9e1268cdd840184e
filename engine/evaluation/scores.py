"""k-NN and the fast probe together, of any way to turn images into features, in this process alone."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.evaluation.features import Encode, extract, mean_token, pixels
from engine.evaluation.neighbours import knn_accuracy
from engine.evaluation.probe import probe_accuracy
from engine.runtime import Runtime
from engine.start_up import check_classes
from engine.weights.export import read_encoder
from recipes.schema import Recipe
from shards.dataset import open_dataset


def alone() -> Runtime:
    """A world of one rank, without any process group."""
    return Runtime(0, 1, 0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def score(encode: Encode, data: Path, recipe: Recipe) -> dict[str, float]:
    """`knn` and `probe` accuracy in percent on `data`/val, learned from `data`/train."""
    train, val = open_dataset(data / "train"), open_dataset(data / "val")
    check_classes(train, val)
    settings, runtime = recipe.evaluation, alone()
    bank = extract(encode, train, settings.knn_train_samples, recipe, runtime)
    queries = extract(encode, val, settings.knn_val_samples, recipe, runtime)
    return {
        "knn": knn_accuracy(bank, queries, k=settings.knn_k, temperature=settings.knn_temperature),
        "probe": probe_accuracy(bank, queries),
    }


def score_checkpoint(checkpoint: Path, data: Path, *, of_pixels: bool = False) -> dict[str, float]:
    """Scores of a checkpoint's encoder; `of_pixels`: of the images as that encoder would get them."""
    encoder, recipe = read_encoder(checkpoint, alone().device)
    return score(pixels if of_pixels else mean_token(encoder), data, recipe)
