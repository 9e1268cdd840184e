"""An evaluation counts each sample exactly once, whatever the ranks and the batch size; and only labelled samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from damage import no_header, no_tables
from hypothesis import given
from hypothesis import strategies as st
from images import jpeg_bytes
from tars import make_dataset

from engine.evaluation import features
from engine.evaluation.features import extract, share, spread
from engine.runtime import Runtime
from engine.start_up import check_classes, require_labels
from recipes import registry
from recipes.overrides import apply_overrides
from shards.dataset import Dataset
from shards.reading.bad_samples import BadSamples

NUM = 37
WORLDS = (1, 2, 3, 7)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("val"), [jpeg_bytes(seed, 40, 40) for seed in range(NUM)], per_tar=8)


@given(st.integers(1, 3000), st.integers(1, 4000), st.sampled_from(WORLDS))
def test_the_ranks_parts_are_all_and_nothing_twice(num_samples: int, limit: int, world_size: int) -> None:
    parts = [share(num_samples, limit, rank, world_size) for rank in range(world_size)]
    together = np.concatenate(parts)
    np.testing.assert_array_equal(together, spread(num_samples, limit))
    assert len(together) == len(set(together.tolist())) == min(limit, num_samples)
    assert together.min() >= 0 and together.max() < num_samples
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(st.integers(1, 10**7), st.integers(1, 5000))
def test_a_part_of_a_large_set_has_its_size(num_samples: int, limit: int) -> None:
    assert len(spread(num_samples, limit)) == min(limit, num_samples)


def counted(
    dataset: Dataset, world_size: int, batch: int, limit: int, monkeypatch: pytest.MonkeyPatch, *overrides: str,
    bad: BadSamples | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Features (the mean of the pixels) and labels as all ranks together find them, one rank after the other."""
    monkeypatch.setattr(features, "gather", lambda parts, runtime: torch.cat(parts) if parts else None)
    recipe = apply_overrides(
        registry.load("vit_ti_mae_demo"), [f"evaluation.batch={batch}", "data.threads=1", "precision=fp32", *overrides]
    )
    found = [
        extract(
            lambda images: images.double().mean((2, 3)), dataset, limit, recipe,
            Runtime(rank, world_size, rank, world_size, torch.device("cpu")), bad,
        )
        for rank in range(world_size)
    ]  # fmt: skip
    whole = [part for part in found if part.labels is not None]
    return torch.cat([part.features for part in whole]), torch.cat([part.labels for part in whole])


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize(("batch", "limit"), [(1, 1000), (5, 1000), (64, 1000), (4, 11), (3, 2)])
def test_every_division_finds_the_same(
    world_size: int, batch: int, limit: int, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The features tell the samples apart, so a repeated or a lost one shows."""
    rows, labels = counted(dataset, world_size, batch, limit, monkeypatch)
    expected, _ = counted(dataset, 1, NUM, 1000, monkeypatch)
    assert len(set(expected[:, 0].tolist())) == NUM
    wanted = spread(NUM, limit)
    assert torch.equal(rows, expected[wanted])
    assert labels.tolist() == (wanted % 5).tolist()


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_what_cannot_be_read_is_left_out_once(
    world_size: int, batch: int, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where all of a rank's part is bad: of 37 samples on 7 ranks the last has 32 ... 36."""
    expected, _ = counted(dataset, 1, NUM, 1000, monkeypatch)
    encoded = [jpeg_bytes(seed, 40, 40) for seed in range(NUM)]
    harm = {0: no_tables, 9: no_header, **dict.fromkeys(range(32, 37), no_tables)}
    for number, change in harm.items():
        encoded[number] = change(encoded[number])
    damaged = make_dataset(tmp_path, encoded, per_tar=8, sizes=[(40, 40)] * NUM)
    bad = BadSamples(damaged, 0.5)
    rows, labels = counted(
        damaged, world_size, batch, 1000, monkeypatch,
        "data.on_bad_sample=quarantine", "data.max_bad_fraction=0.5", bad=bad,
    )  # fmt: skip
    wanted = [number for number in range(NUM) if number not in harm]
    assert torch.equal(rows, expected[wanted]) and labels.tolist() == [number % 5 for number in wanted]
    assert sorted(bad.ids) == sorted(harm)


def test_samples_without_a_label_are_refused_with_the_numbers(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlabelled = dataclasses.replace(dataset, label=np.where(np.arange(NUM) < 3, -1, dataset.label))
    with pytest.raises(ValueError, match=f"{dataset.folder}: 3 of 37 samples have no label"):
        counted(unlabelled, 1, 4, 5, monkeypatch)
    with pytest.raises(ValueError, match="data.val=.*: 3 of 37 samples have no label"):
        check_classes(dataset, unlabelled)
    with pytest.raises(ValueError, match="data.train=.*: 3 of 37 samples have no label"):
        check_classes(unlabelled, dataset)
    check_classes(unlabelled, None)  # nothing is evaluated
    require_labels(dataset, "data")
