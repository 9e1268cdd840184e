"""The suites `loader` and `startup` compare what is equal, and say so where it is not; no speed is asked."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from recipes import registry
from shards.dataset import Dataset
from tools.benchmarks import data, loader, peers, startup
from tools.benchmarks.side_by_side import Settings

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """24 samples, of pictures in both sizes."""
    made = data.make_pictures(2)
    pictures = [*made, *(loader.shrunk(picture, 256) for picture in made)]
    return loader.make_set(tmp_path_factory.mktemp("set"), pictures, per_class=3)


def task(dataset: Dataset, view: str, **changes: object) -> peers.Task:
    settings = dataclasses.replace(registry.load(loader.VIEWS[view][0]).data, image_size=64, threads=1, **changes)
    return peers.Task.of(dataset, view, settings, 8)


@pytest.mark.parametrize("view", loader.VIEWS)
def test_every_peer_makes_our_images(dataset: Dataset, view: str) -> None:
    wanted = task(dataset, view)
    ours = loader.images_of(loader.our_batches(wanted), wanted)
    assert sorted(ours) == list(range(24))
    found = peers.peers()
    assert list(found)[:2] == ["torch DataLoader and PIL", "webdataset and PIL"]
    for name, peer in found.items():
        theirs = loader.images_of(peer(wanted), wanted)
        loader.require_equal(ours, theirs, name, loader.VIEWS[view][1])
        assert all(len(images) == 1 + (view == "pretrain_lut") for images in theirs.values())


def test_other_images_are_no_comparison(dataset: Dataset) -> None:
    wanted = task(dataset, "pretrain_mae")
    ours = loader.images_of(loader.our_batches(wanted), wanted)
    other = loader.images_of(peers.pil_loader(task(dataset, "pretrain_mae", scale=(0.1, 0.2))), wanted)
    with pytest.raises(RuntimeError, match=r"x: image 0 of sample \d+ differs by [\d.]+ levels of 255 on average, 0.6"):
        loader.require_equal(ours, other, "x", 0.6)
    with pytest.raises(RuntimeError, match="x: 24 and 1 samples, which should be the same"):
        loader.require_equal(ours, {0: ours[0]}, "x", 0.6)
    with pytest.raises(RuntimeError, match="differs by nan"):
        loader.require_equal({0: [np.full(3, np.nan)]}, {0: [np.zeros(3)]}, "x", 0.6)


def test_rates_are_images_per_second_of_both(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def timed(works, rounds: int, clock) -> list[float]:
        seen.append((rounds, clock))
        for work in works:
            work()
        return [2.0, 3.0]

    monkeypatch.setattr(loader, "interleaved", timed)
    monkeypatch.setattr(loader, "peers", lambda: {"torch DataLoader and PIL": peers.pil_loader})
    (row,) = loader.view_rates(dataset, "evaluate", "evaluation", rounds=3)
    assert seen == [(3, loader.cpu_seconds)] and row.name == "evaluation, against torch DataLoader and PIL"
    assert (row.ours, row.theirs, row.ratio, row.unit) == (12.0, 8.0, 1.5, "images/CPU s")


def test_processor_time_is_that_of_threads_and_children() -> None:
    before = loader.cpu_seconds()
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.2: pass"], check=True)
    assert loader.cpu_seconds() - before >= 0.19


def test_pictures_are_shrunk_to_their_shorter_side() -> None:
    (picture,) = data.make_pictures(1)
    width, height = Image.open(io.BytesIO(picture)).size
    small = loader.shrunk(picture, 256)
    assert min(Image.open(io.BytesIO(small)).size) == 256 and len(small) < len(picture)
    assert max(Image.open(io.BytesIO(small)).size) == round(max(width, height) * 256 / min(width, height))


@pytest.mark.long
def test_the_suite_of_the_loader() -> None:
    threads = torch.get_num_threads()
    try:
        rows = list(loader.suite(Settings(rounds=1, scale=0.02)))
    finally:
        torch.set_num_threads(threads)
    expected = [f"{view}, {size}" for size in ("original", "shorter side 256") for view in loader.VIEWS]
    assert list(dict.fromkeys(row.name.rpartition(", against")[0] for row in rows)) == expected
    assert len(rows) == len(expected) * len(peers.peers()) and all(row.ours > 0 < row.theirs for row in rows)


def test_the_suite_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "COMMANDS", startup.COMMANDS[:1])
    (row,) = startup.suite(Settings(rounds=1))
    assert row.name == "engine/train.py --list, against import torch" and row.unit == "CPU ms"
    assert row.ours > 0 and row.ratio == pytest.approx(row.theirs / row.ours)
    with pytest.raises(RuntimeError, match=r"-c import no_such_module: ended with exit code 1: ModuleNotFoundError"):
        startup.answer("-c", "import no_such_module")
    monkeypatch.setattr(startup, "answer", lambda *arguments: "\n")
    with pytest.raises(RuntimeError, match="says nothing"):
        list(startup.suite(Settings(rounds=1)))


def test_lists_and_help_import_nothing_heavy() -> None:
    """All that `startup` measures, in one interpreter; and that these commands are asked is checked too."""
    heavy = ("torch", "numpy", "timm", "deepspeed", "nvidia.dali", "PIL", "webdataset")
    script = (
        "import runpy, sys\n"
        f"for command in {startup.COMMANDS!r}:\n"
        "    sys.argv = command.split()\n"
        "    try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "    except SystemExit as end: assert not end.code, command\n"
        f"    print('heavy:', [name for name in {heavy!r} if name in sys.modules], command)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^heavy: (.*?\]) (.*)$", done.stdout, re.MULTILINE)
    assert found == [("[]", command) for command in startup.COMMANDS]
