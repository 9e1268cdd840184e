"""Conversion and verification against what people would use: the comparisons measure what they say; no speed asked."""

from __future__ import annotations

import pytest

from shards.layout import read_manifest
from tests.images import make_class_folders
from tools import data_benchmarks
from tools.data_benchmarks import conversion_rate, hash_rate


def test_rates_are_amounts_over_medians(tmp_path, shards, monkeypatch):
    run = []

    def timed(works, rounds: int) -> list[float]:
        run.append((rounds, [work() for work in works]))
        return [2.0, 4.0]

    monkeypatch.setattr(data_benchmarks, "interleaved", timed)
    make_class_folders(tmp_path, classes=2, per_class=4)
    found = conversion_rate(tmp_path, rounds=3)
    assert (found["ours"], found["theirs"], found["ratio"], found["unit"]) == (4.0, 2.0, 2.0, "images/s")
    assert run.pop() == (3, [8, None])
    folder = shards / "train"
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    found = hash_rate(folder)
    assert found["ours"] == pytest.approx(size / 2) and found["unit"] == "MB/s" and read_manifest(folder).samples == 80
