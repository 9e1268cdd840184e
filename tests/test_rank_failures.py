"""A rank that is killed, stopped, fails or leaves: all are gone in time, the first one is named, nothing is left."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from hosts import two_hosts
from runs import TIMEOUT, TINY, TRAIN, environment, free_port, launch

from engine.heartbeats import SILENCE

PATIENCE = 20  # seconds, run.timeout of these runs
GONE = 60  # seconds until all are gone that we promise; a stopped rank: run.timeout and 30 more
STOPPED = PATIENCE + 30
long = pytest.mark.long


def arguments(folder: Path, shards: Path) -> list[str]:
    return ["--recipe", "vit_ti_mae_demo", *TINY, f"run.out={folder}", f"data.train={shards}/train", "data.val=",
            "run.steps=100000", "run.save_every=0", "run.log_every=1", f"run.timeout={PATIENCE}"]  # fmt: skip


def processes(folder: Path) -> list[str]:
    return subprocess.run(["pgrep", "-f", f"run.out={folder}( |$)"], capture_output=True, text=True).stdout.split()


@pytest.mark.parametrize(
    ("launcher", "fault", "named", "within"),
    [
        ("torchrun", "kill", "the process is gone", GONE),
        pytest.param("deepspeed", "stop", "the process is stopped", STOPPED, marks=long),
        pytest.param("torchrun", "stop", "the process is stopped", STOPPED, marks=long),
        pytest.param("deepspeed", "kill", "the process is gone", GONE, marks=long),
        pytest.param("deepspeed", "raise", "RuntimeError: MASKWRIGHT_FAULT", GONE, marks=long),
        pytest.param("torchrun", "raise", "RuntimeError: MASKWRIGHT_FAULT", GONE, marks=long),
        pytest.param("deepspeed", "leave", "the process is gone", GONE, marks=long),
        pytest.param("torchrun", "exit", "the process is gone", GONE, marks=long),
    ],
)
def test_all_are_gone_and_the_first_is_named(launcher, fault, named, within, shards, tmp_path):
    folder = tmp_path / "run"
    command = launch(TRAIN, *arguments(folder, shards), launcher=launcher, ranks=2)
    variables = environment(tmp_path) | {"MASKWRIGHT_FAULT": f"step.begin:{fault}@4#1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=variables)
    since = time.time() - (folder / "metrics.jsonl").stat().st_mtime
    assert done.returncode != 0
    log = (folder / "logs/rank_00000.log").read_text()
    assert "rank 0 lost the other ranks: rank 1 (process" in log, log
    assert named in log
    assert since < within and not processes(folder)


def start_rank(rank: int, port: str, command: list[str], prefix: tuple[str, ...] = (), **variables) -> subprocess.Popen:
    """One rank as a launcher of another machine would start it."""
    world = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": port,
             "MASTER_ADDR": "127.0.0.1"}  # fmt: skip
    return subprocess.Popen(
        [*prefix, *command], env=variables.pop("env") | world | variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def outputs(ranks: list[subprocess.Popen]) -> list[str]:
    return [rank.communicate(timeout=TIMEOUT)[0] for rank in ranks]


def test_ranks_that_disagree_refuse_before_the_first_step(shards, tmp_path):
    """Another learning rate on rank 1: nobody trains, and both are told."""
    command, port = launch(TRAIN, *arguments(tmp_path / "run", shards)), free_port()
    differing = [*command, "optim.lr=0.5"]
    ranks = [start_rank(0, port, command, env=environment(tmp_path)),
             start_rank(1, port, differing, env=environment(tmp_path))]  # fmt: skip
    told = outputs(ranks)
    assert [rank.returncode for rank in ranks] == [2, 2], told
    assert "optim.lr: 0.0015 and 0.5" in told[0] and "rank 1" in told[0]
    assert not (tmp_path / "run/metrics.jsonl").exists() and not (tmp_path / "run/checkpoints").exists()


def test_two_machines_train_as_one(shards, tmp_path):
    """Their own network, their own names; then one of them is cut off, and the other says so and ends."""
    folder = tmp_path / "run"
    command, port = launch(TRAIN, *arguments(folder, shards)), free_port()
    metrics = folder / "metrics.jsonl"
    with two_hosts() as hosts:
        ranks = [start_rank(rank, port, command, host.prefix, env=environment(tmp_path), **host.variables)
                 for rank, host in enumerate(hosts)]  # fmt: skip
        deadline = time.monotonic() + TIMEOUT
        while not (metrics.exists() and '"step": 3,' in metrics.read_text()) and time.monotonic() < deadline:
            assert all(rank.poll() is None for rank in ranks), outputs(ranks)
            time.sleep(0.1)
        os.kill(find(folder, "rank_00001"), 9)
        began = time.monotonic()
        told = outputs(ranks)
        took = time.monotonic() - began
    assert took < GONE and ranks[0].returncode == 1
    assert "micro 4 x 2 ranks" in told[0] and "rank 1 (process" in told[0]
    assert "on mw-node1)" in told[0] and "no sign of life" in told[0] and SILENCE < GONE
    assert not processes(folder)


def find(folder: Path, rank: str) -> int:
    """The process that a rank's heartbeat names."""
    import json

    return json.loads((folder / f"logs/{rank}.heartbeat.json").read_text())["pid"]
