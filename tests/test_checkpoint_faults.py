"""Ranks that cannot write or are killed while they write, a disk that is too small: the old checkpoint stays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import ROOT, TIMEOUT, environment, train

from engine.checkpoints import space
from engine.checkpoints.manifests import read_manifest, total_bytes


def work(folder: Path, data: Path, *arguments: object, mode: str = "kills") -> dict:
    """The last line of tests/save_worker.py, with what it printed before under `output`."""
    command = [sys.executable, str(ROOT / "tests" / "save_worker.py"), mode, folder, f"{data}/train", *arguments]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=TIMEOUT, env=environment(folder.parent)
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"folder": folder, "output": done.stdout + done.stderr}


@pytest.fixture(scope="module")
def failures(shards, tmp_path_factory) -> dict:
    """Two ranks; one of them cannot write, in one way after the other."""
    return work(tmp_path_factory.mktemp("failures") / "run", shards, mode="failures")


def test_a_rank_that_cannot_write_leaves_nobody_waiting(failures):
    outcomes = [next(iter(scene.items())) for scene in failures["scenes"]]
    assert failures["codes"] == [0, 0]
    assert [(name, outcome[:7]) for name, outcome in outcomes] == [
        ("well", "saved"), ("once", "saved"), ("twice", "went on"), ("export", "went on"), ("again", "saved"),
        ("manifest", "went on"), ("large", "went on"), ("better", "saved"), ("nan", "went on"), ("full", "went on"),
        ("third", "stopped"),
    ]  # fmt: skip
    assert "3 saves in a row have failed" in outcomes[-1][1]


def test_the_old_checkpoint_stays_and_nothing_else_does(failures):
    left = [scene["left"] for scene in failures["scenes"]]
    steps = [1, 2, 2, 2, 5, 5, 5, 8, 8, 8, 8]
    assert left == [[f"step_{step:08d}"] for step in steps]


def test_the_rank_and_its_reason_are_named(failures):
    for fragment in (
        "step 3 could not be saved (rank 1: [Errno 28] No space left on device",
        "step 4 could not be saved (rank 0: [Errno 28] No space left on device",
        "step 7 could not be saved (rank 1: [Errno 27] File too large: ",
        "state.0.exp_avg is not finite); the newest checkpoint is step_00000008",
        "a checkpoint needs", "free; make room",
    ):  # fmt: skip
        assert fragment in failures["output"], fragment


@pytest.fixture(scope="module")
def checkpoint(failures) -> Path:
    return Path(failures["folder"]) / "checkpoints" / failures["newest"]


def test_time_and_size_of_a_save_are_shown(failures, checkpoint):
    size = total_bytes(read_manifest(checkpoint))
    line = next(line for line in failures["output"].splitlines() if line.startswith("step 8  saved"))
    assert f"step_00000008: {size / 1e6:.2f} MB in " in line and line.endswith(" s")


def test_a_manifest_says_what_wrote_it(checkpoint):
    manifest = read_manifest(checkpoint, resumable=True)
    assert manifest["world_size"] == 2 and manifest["hardware"].startswith("cpu, ")
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"].keys() == {"python", "torch", "deepspeed"}


def test_the_estimate_of_a_first_checkpoint_is_near(checkpoint, tmp_path):
    from engine.weights.export import read_parts

    state, _ = read_parts(checkpoint)
    size, estimate = total_bytes(read_manifest(checkpoint)), space.expected_bytes(tmp_path, state)
    assert 0.7 * size < estimate < 1.2 * size, (estimate, size)


@pytest.mark.parametrize("ranks", [1, 2])
def test_kills_while_saving_lose_nothing(ranks, shards, tmp_path):
    """Half of them at fault points, half blindly; each time the newest complete checkpoint is resumed, and is whole."""
    result = work(tmp_path / "run", shards, ranks, 3, ranks)
    assert (result["kills"], result["resumes_exact"], result["lost"], result["broken"]) == (3, 3, 0, [])


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "count"), [(1, 60), (2, 60)])
def test_a_hundred_and_twenty_kills_lose_nothing(ranks, count, shards, tmp_path):
    result = work(tmp_path / "run", shards, ranks, count, 100 + ranks)
    print({name: value for name, value in result.items() if name not in ("folder", "output")})
    assert (result["kills"], result["resumes_exact"], result["lost"], result["broken"]) == (count, count, 0, [])


@pytest.mark.long
def test_a_disk_that_is_too_small_ends_the_run_with_both_numbers(shards, tmp_path):
    """A real one, of 2 MB: the first checkpoint fits, the second does not."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        run = train(disk / "run", f"data.train={shards}/train", "data.val=", "precision=fp32", "run.steps=8",
                    "run.save_every=2", "run.keep=1", succeeds=False)  # fmt: skip
        assert run.returncode == 1 and "Traceback" not in run.output
        assert "are free; make room, or lower run.keep" in run.output and "trying again at the next save" in run.output
        assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == ["step_00000002"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)
