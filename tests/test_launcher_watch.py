"""Ranks do not outlive their launcher: its end is a request to stop, and a deadline."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WAIT = 120  # seconds until a process is given up; generous, because machines are busy

RANK = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from engine import launcher_watch, signals
how = sys.argv[2]
if how == "saves for ever":
    launcher_watch.DEADLINE = 1.0
if how != "starts":
    signals.REQUESTS.keep_until_asked()
launcher_watch.stop_with(int(sys.argv[3]) if how == "late" else os.getppid())
print("ready", os.getpid(), flush=True)
while not signals.REQUESTS.first:
    time.sleep(0.01)
if how == "saves for ever":
    time.sleep(600)
time.sleep(0.2)
open(sys.argv[-1], "w").write("saved")
"""
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
# The two processes of `deepspeed`: it starts deepspeed.launcher.launch, which starts the ranks.
DEEPSPEED_RUNNER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {LAUNCHER!r}, *sys.argv[1:]])"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's promise is Linux's")


def start_rank(launcher: str, how: str, *marks: str) -> tuple[subprocess.Popen, int]:
    """A launcher with its rank below, and the rank's process id; `marks` show in all their command lines."""
    command = [sys.executable, "-c", launcher, RANK, str(ROOT), how, *marks]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    ready, pid = process.stdout.readline().split()
    assert ready == "ready"
    return process, int(pid)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ends(pid: int) -> bool:
    deadline = time.monotonic() + WAIT
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_running(pid)


def killed(launcher: subprocess.Popen) -> None:
    launcher.kill()
    launcher.wait()


@pytest.mark.parametrize("launcher", [LAUNCHER, DEEPSPEED_RUNNER], ids=["parent", "grandparent"])
def test_a_rank_saves_and_ends_with_its_launcher(launcher, tmp_path):
    """Also where `deepspeed` is killed and its second process, the rank's parent, lives on."""
    process, rank = start_rank(launcher, "saves", "deepspeed.launcher.launch", str(tmp_path / "saved"))
    assert is_running(rank)
    killed(process)
    assert ends(rank) and (tmp_path / "saved").exists()


def test_a_rank_that_does_not_end_is_killed(tmp_path):
    process, rank = start_rank(LAUNCHER, "saves for ever", str(tmp_path / "saved"))
    killed(process)
    assert ends(rank) and not (tmp_path / "saved").exists()


def test_a_rank_that_has_not_begun_ends_at_once(tmp_path):
    process, rank = start_rank(LAUNCHER, "starts", str(tmp_path / "saved"))
    killed(process)
    assert ends(rank) and not (tmp_path / "saved").exists()


def test_a_stopped_rank_is_woken(tmp_path):
    process, rank = start_rank(LAUNCHER, "saves", str(tmp_path / "saved"))
    os.kill(rank, signal.SIGSTOP)
    killed(process)
    assert ends(rank) and (tmp_path / "saved").exists()


def test_a_launcher_that_had_ended_before_the_watch_began(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    process, rank = start_rank(LAUNCHER, "late", str(gone.pid), str(tmp_path / "saved"))
    assert ends(rank) and (tmp_path / "saved").exists()
    killed(process)


def test_a_shell_that_ends_takes_no_rank_along(tmp_path):
    """The grandparent under torchrun is whatever started it: a shell that is logged out, for example."""
    process, rank = start_rank(DEEPSPEED_RUNNER, "saves", "torchrun", str(tmp_path / "saved"))
    parent = int(Path(f"/proc/{rank}/stat").read_text().rpartition(")")[2].split()[1])
    killed(process)
    assert is_running(parent)
    time.sleep(0.5)
    assert is_running(rank)
    os.kill(parent, signal.SIGKILL)
    assert ends(rank)


@pytest.mark.parametrize("launched", [True, False])
def test_only_ranks_of_a_launcher_are_bound(launched, monkeypatch):
    """Plain `python train.py &` must survive its shell."""
    from engine import runtime

    bound = []
    monkeypatch.setattr(runtime, "stop_with", bound.append)
    monkeypatch.setattr(runtime, "world_environment", lambda environment: 1 / 0)  # as far as this test goes
    monkeypatch.setenv("LOCAL_RANK", "0") if launched else monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ZeroDivisionError):
        runtime.start(timeout=9)
    assert bound == ([os.getppid()] if launched else [])
