"""Data that many tests share, made once per session."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from images import make_class_folders

from shards.making.conversion import convert
from shards.making.planning import Options, make_plan
from shards.sources.class_folders import list_class_folders

# Where tests are started in the background or by nohup, Ctrl-C is ignored, and every process that they start inherits
# that: those that are to be ended by it would stay.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def make_shards(source: Path, out: Path, samples_per_shard: int) -> Path:
    convert(make_plan(list_class_folders(source), Options(samples_per_shard=samples_per_shard)), out, num_workers=1)
    return out


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """A folder with `train` (4 classes x 20 images in 4 shards) and `val` (4 x 5)."""
    root = tmp_path_factory.mktemp("data")
    for split, per_class, seed in (("train", 20, 0), ("val", 5, 1)):
        make_class_folders(root / "images" / split, classes=4, per_class=per_class, seed=seed)
        make_shards(root / "images" / split, root / split, samples_per_shard=20)
    return root
