"""Ranks that do not find each other say so, with numbers and a remedy, before a user loses patience."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import free_port

from engine.rendezvous import PATIENCE, explain

ROOT = Path(__file__).resolve().parents[1]
CODE = """
import sys
from datetime import timedelta
import torch
from engine.rendezvous import join_world
try:
    join_world("gloo", torch.device("cpu"), timedelta(seconds=60), patience=float(sys.argv[1]))
except RuntimeError as error:
    sys.exit(str(error))
print("joined", torch.distributed.get_world_size())
"""


def start(rank: int, world_size: int, port: str, patience: float) -> subprocess.Popen:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(rank), "WORLD_SIZE": str(world_size)}
    command = [sys.executable, "-c", CODE, str(patience)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | where, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_two_ranks_meet():
    port = free_port()
    ranks = [start(rank, 2, port, 100) for rank in (1, 0)]
    assert [rank.communicate(timeout=300)[0] for rank in ranks] == ["joined 2\n", "joined 2\n"]


def test_a_missing_rank_is_counted():
    done = start(0, 3, free_port(), 1.0).communicate(timeout=300)[1]
    assert "rank 0 of 3: only 1/3 ranks arrived at 127.0.0.1:" in done and "within 1 s" in done


def test_nobody_at_the_meeting_point():
    began = time.monotonic()
    done = start(1, 2, free_port(), 1.0).communicate(timeout=300)[1]
    assert "rank 1 of 2: the ranks did not meet at 127.0.0.1:" in done and "is rank 0 running" in done
    assert PATIENCE < 120 and time.monotonic() - began < 120


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = start(0, 2, port, 30.0).communicate(timeout=300)[1]
    assert f"port {port} of this machine is in use" in done and "--master_port" in done


@pytest.mark.parametrize("reason", ["", "\n", "Connection reset by peer\nframe 0"])
def test_any_other_reason_is_passed_on(reason):
    place = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500", "RANK": "3", "WORLD_SIZE": "8"}
    text = explain(reason, place, 100)
    assert "\n" not in text and "node0:29500" in text and (reason.strip() or "no reason").splitlines()[0] in text
