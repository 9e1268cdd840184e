"""Shards that change while they are read: what can go on goes on, what cannot ends at once with the shard's name."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from images import jpeg_bytes
from runs import ROOT, TIMEOUT, TINY, TRAIN, environment, launch
from tars import make_dataset

from recipes.schema import Data
from shards.dataset import Dataset
from shards.layout import DataError
from shards.reading.bus_errors import explained, explanation
from shards.reading.loader import EvaluationLoader
from shards.reading.sample_check import UndecodableSample, check_samples

NUM = 40
CPU = torch.device("cpu")


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path, [jpeg_bytes(seed, 160, 120) for seed in range(NUM)], per_tar=10)


def loader(dataset: Dataset, most_pairs: int) -> EvaluationLoader:
    data = Data(image_size=16, threads=1, prefetch=1)
    return EvaluationLoader(dataset, np.arange(NUM), data=data, batch=2, device=CPU, most_pairs=most_pairs)


def replace_by_rename(old: Path, change=None) -> None:
    new = old.with_suffix(".new")
    shutil.copy(old, new)
    if change:
        change(new)
    os.replace(new, old)


@pytest.mark.parametrize("most_pairs", [1, 1000], ids=["opened again", "open all the time"])
def test_an_equal_shard_renamed_into_place_changes_nothing(dataset: Dataset, most_pairs: int) -> None:
    with loader(dataset, most_pairs) as plain:
        expected = [batch.views[0].clone() for batch in plain]
    with loader(dataset, most_pairs) as changing:
        for number, batch in enumerate(changing):
            assert torch.equal(batch.views[0], expected[number])
            if number == 2:
                for path in dataset.paths:
                    replace_by_rename(path)
    assert number == len(expected) - 1


def test_the_old_shard_is_read_to_the_end_of_the_segment(dataset: Dataset) -> None:
    with loader(dataset, most_pairs=1000) as changing:
        changing.next_batch()
        for path in dataset.paths:
            replace_by_rename(path, lambda new: new.write_bytes(b""))
        assert sum(len(batch.labels) for batch in changing) == NUM - 2


def test_another_shard_renamed_into_place_is_noticed_by_the_next_segment(dataset: Dataset) -> None:
    with loader(dataset, most_pairs=1) as changing:
        changing.next_batch()
        shutil.copy(dataset.paths[0], dataset.folder / "other")
        os.replace(dataset.folder / "other", dataset.paths[3])
        with pytest.raises(UndecodableSample, match="set 003.tar:000"):
            list(changing)


def test_a_shard_cut_before_its_segment_is_named(dataset: Dataset) -> None:
    with loader(dataset, most_pairs=1) as changing:
        changing.next_batch()
        os.truncate(dataset.paths[3], 5000)
        with pytest.raises(DataError, match="set 003.tar:000.*the tar holds 5000 bytes"):
            list(changing)


def test_a_shard_cut_while_it_is_checked_is_named(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its size was asked for, before it is read: a mapping would kill the process there."""
    os.truncate(dataset.paths[3], 5000)
    monkeypatch.setattr("shards.reading.sample_check.os.fstat", lambda descriptor: SimpleNamespace(st_size=10**9))
    with pytest.raises(DataError, match="set 003.tar:000.*: its tar got shorter while it was read"):
        check_samples(dataset, np.arange(NUM))


@pytest.mark.parametrize(("launcher", "ranks"), [("python", 1), pytest.param("torchrun", 2, marks=pytest.mark.long)])
def test_a_shard_cut_while_it_is_mapped_ends_the_run_with_its_name(
    launcher: str, ranks: int, shards: Path, tmp_path: Path
) -> None:
    """The kernel kills a process that reads behind the end of a mapped file, and DALI maps them."""
    shutil.copytree(shards / "train", tmp_path / "train")
    command = launch(
        TRAIN, "--recipe", "vit_ti_mae_demo", *TINY, f"data.train={tmp_path}/train", f"run.out={tmp_path}/run",
        "run.steps=100000", launcher=launcher, ranks=ranks,
    )  # fmt: skip
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(tmp_path)
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    victim = sorted((tmp_path / "train").glob("*.tar"))[2]
    victim.chmod(0o644)
    os.truncate(victim, 512)
    output, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, -signal.SIGBUS)
    assert f"{victim}: got shorter while it was read: 512 bytes, its last image ends at " in output


def test_another_cause_is_not_called_a_cut_shard(dataset: Dataset) -> None:
    assert "/dev/shm is full" in explanation([dataset])
    missing = dataclasses.replace(dataset, paths=(*dataset.paths[:3], dataset.folder / "gone.tar"))
    assert "/dev/shm is full" in explanation([missing]), "an open file that was removed can be read on"
    os.truncate(dataset.paths[1], 700)
    assert explanation([dataset]).startswith(f"{dataset.paths[1]}: got shorter while it was read: 700 bytes")


def test_the_handler_is_gone_afterwards_and_other_signals_pass() -> None:
    before = signal.getsignal(signal.SIGBUS)
    with explained([], rank=0):
        assert signal.getsignal(signal.SIGBUS) is not before
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGBUS) is before and signal.set_wakeup_fd(-1) == -1


def test_a_fault_in_any_thread_of_a_library_is_explained(tmp_path: Path) -> None:
    code = """
import ctypes, mmap, os, sys, threading
from shards.reading.bus_errors import explained
with open(sys.argv[1], "w+b") as file:
    file.truncate(8192)
    mapped = mmap.mmap(file.fileno(), 8192)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    os.ftruncate(file.fileno(), 0)
    with explained([], 5):
        thread = threading.Thread(target=ctypes.CDLL(None).strlen, args=(ctypes.c_void_p(address),))
        thread.start()
        thread.join()
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "file")], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 1 and "error: rank 5: memory that is mapped could not be read (SIGBUS)" in done.stderr
