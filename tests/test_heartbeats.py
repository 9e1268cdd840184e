"""Signs of life: who is named when ranks lose each other, and a step that never ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from engine import heartbeats
from engine.heartbeats import LOST, PERIOD, SILENCE, Beat, Heartbeat, heartbeat_file, lost_others, others, read_beats
from engine.runtime import Runtime

ROOT = Path(__file__).resolve().parents[1]
WORLD = Runtime(rank=0, world_size=4, local_rank=0, local_world_size=4, device=None)
HERE = heartbeats.socket.gethostname()


def beat(rank: int, **changes) -> Beat:
    now = time.time()
    alive = Beat(rank, HERE, os.getpid(), 6, "training", now - 1, now)
    return replace(alive, **changes)


def leave(folder: Path, *beats: Beat) -> Path:
    for each in beats:
        heartbeat_file(folder, each.rank).write_text(json.dumps(asdict(each)))
    return folder


@pytest.fixture
def ended() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_all_alive_are_told_with_what_they_do(tmp_path):
    leave(tmp_path, beat(1), beat(2, phase="saving"), beat(3))
    told = others(tmp_path, WORLD)
    assert "rank 1 (process" in told and "last seen in step 7, training for" in told and "saving" in told


def test_a_process_that_is_gone_is_the_one(tmp_path, ended):
    leave(tmp_path, beat(1), beat(2, pid=ended), beat(3))
    told = others(tmp_path, WORLD)
    assert told.startswith("rank 2 ") and "the process is gone" in told and "rank 1" not in told


def test_a_process_that_nobody_waited_for_is_gone(tmp_path):
    zombie = subprocess.Popen(["true"])
    deadline = time.monotonic() + 60
    while not beat(1, pid=zombie.pid).is_gone() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert beat(1, pid=zombie.pid).is_gone()
    zombie.wait()


def test_the_number_of_a_process_elsewhere_says_nothing(ended):
    assert beat(1, pid=ended).is_gone() and not beat(1, pid=ended, host="another").is_gone()


def test_silence_is_told_after_a_while(tmp_path):
    leave(tmp_path, beat(1), beat(2, host="node7", alive_at=time.time() - SILENCE - 5), beat(3))
    assert "rank 2 (process" in others(tmp_path, WORLD) and "no sign of life for" in others(tmp_path, WORLD)
    assert SILENCE >= 3 * PERIOD  # a busy machine may be late


def test_whoever_ended_first_is_told_first(tmp_path):
    first = beat(2, ended="DataError: shard 7 is cut", alive_at=time.time() - 3)
    second = beat(1, ended=f"rank 1 {LOST}: ...", alive_at=time.time() - 4)
    leave(tmp_path, second, first, beat(3))
    told = others(tmp_path, WORLD)
    assert told.startswith("rank 2 ") and told.index("shard 7 is cut") < told.index("rank 1 ")


def test_a_silent_rank_is_waited_for(tmp_path, monkeypatch):
    """It was alive a moment ago; the next signs do not come."""
    monkeypatch.setattr(heartbeats, "SILENCE", 0.3)
    leave(tmp_path, beat(1, host="node7", alive_at=time.time()))
    assert "no sign" not in others(tmp_path, WORLD)
    assert "no sign of life" in others(tmp_path, WORLD, wait=30)


def test_nothing_or_nonsense_in_the_folder(tmp_path):
    assert "nothing is known" in others(tmp_path, WORLD)
    heartbeat_file(tmp_path, 1).write_text('{"rank": 1')
    heartbeat_file(tmp_path, 2).write_text('{"rank": 2}')
    heartbeat_file(tmp_path, 3).write_bytes(b"\xff")
    assert read_beats(tmp_path, WORLD) == []


def test_a_heart_beats_says_where_it_is_and_why_it_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeats, "PERIOD", 0.01)
    other = replace(WORLD, rank=1)
    heart = Heartbeat(tmp_path / "logs", other, patience=0, note=pytest.fail)
    heart.at("training", 41)
    first = read_beats(tmp_path / "logs", WORLD)[0].alive_at
    deadline = time.monotonic() + 60
    while read_beats(tmp_path / "logs", WORLD)[0].phase != "training" and time.monotonic() < deadline:
        time.sleep(0.01)
    told = read_beats(tmp_path / "logs", WORLD)[0]
    assert (told.step, told.phase, told.pid) == (41, "training", os.getpid()) and told.alive_at > first
    heart.close("ValueError: no")
    assert read_beats(tmp_path / "logs", WORLD)[0].ended == "ValueError: no"
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["rank_00001.heartbeat.json"]


def test_a_clock_that_is_set_ends_no_training(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeats, "PERIOD", 0.01)
    ended: list[float] = []
    monkeypatch.setattr(Heartbeat, "_end", lambda self, waited: ended.append(waited))
    heart = Heartbeat(tmp_path, WORLD, patience=600, note=pytest.fail)
    heart.at("training", 41)
    tomorrow = time.time() + 86400
    monkeypatch.setattr(heartbeats.time, "time", lambda: tomorrow)
    deadline = time.monotonic() + 60
    while json.loads(heartbeat_file(tmp_path, 0).read_text())["alive_at"] < tomorrow and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    heart.close()
    assert not ended and json.loads(heartbeat_file(tmp_path, 0).read_text())["alive_at"] == tomorrow


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeats, "PERIOD", 0.01)
    (tmp_path / "logs").write_text("a file")
    warnings: list[str] = []
    heart = Heartbeat(tmp_path / "logs", WORLD, patience=0, note=warnings.append)
    time.sleep(0.1)
    heart.close()
    assert len(warnings) == 1 and "no signs of life" in warnings[0]


def test_a_step_without_end_ends_the_process(tmp_path):
    """Inside other phases, however long, nothing happens."""
    code = f"""
import sys, time
from pathlib import Path
from engine import heartbeats
from engine.runtime import Runtime
heartbeats.PERIOD = 0.05
note = lambda text: print(text, flush=True)
heart = heartbeats.Heartbeat(Path({str(tmp_path)!r}), Runtime(0, 2, 0, 2, None), patience=0.5, note=note)
heart.at("evaluation", 3)
time.sleep(2)
print("still here", flush=True)
heart.at("training", 3)
def hangs(): time.sleep(99)
hangs()
"""
    leave(tmp_path, beat(1, ended="killed by a test"))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1 and done.stdout.startswith("still here\nend: rank 0: no progress")
    assert "rank 0: no progress for" in done.stderr and "in step 4 (run.timeout)" in done.stderr
    assert "killed by a test" in done.stderr and "in hangs" in done.stderr


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[../gloo/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"), True),
        (RuntimeError("Timed out waiting 12000ms for recv operation to complete"), True),
        (RuntimeError("shape '[2]' is invalid for input of size 3"), False),
        (ValueError("closed by peer"), False),
    ],
)
def test_which_errors_mean_that_others_are_gone(error, lost):
    assert lost_others(error) is lost
