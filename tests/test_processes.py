"""Calls in other processes: where they run, what their errors become, and that nothing outlives a killed parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
from runs import ROOT

from shards.layout import DataError
from shards.processes import call_each


def meet(folder: str, expected: int) -> int:
    """This process, once `expected` of them have come."""
    (Path(folder) / str(os.getpid())).touch()
    deadline = time.monotonic() + 60
    while len(os.listdir(folder)) < expected and time.monotonic() < deadline:
        time.sleep(0.01)
    return os.getpid()


def fail(number: int) -> None:
    raise DataError(f"tar {number}")


def die(number: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("num_workers", "elsewhere"), [(1, False), (2, True)])
def test_calls_run_in_as_many_processes(tmp_path, num_workers, elsewhere):
    calls = [(str(tmp_path), num_workers)] * 6
    found = {position: future.result() for position, future in call_each(meet, calls, num_workers)}
    assert sorted(found) == list(range(6))
    assert len(set(found.values())) == num_workers and (os.getpid() not in found.values()) == elsewhere


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_error_belongs_to_its_call(num_workers):
    for position, future in call_each(fail, [(5,), (6,)], num_workers):
        with pytest.raises(DataError, match=f"tar {position + 5}"):
            future.result()


def test_a_process_that_dies_is_told():
    with pytest.raises(BrokenProcessPool):
        for _, future in call_each(die, [(n,) for n in range(4)], 2):
            future.result()


def test_nothing_outlives_a_killed_parent(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        "from test_processes import sleep_long\nfrom shards.processes import call_each\n"
        f"if __name__ == '__main__':\n    list(call_each(sleep_long, [({str(tmp_path)!r}, n) for n in range(2)], 2))\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    deadline = time.monotonic() + 120
    while len(started := list(tmp_path.glob("*.pid"))) < 2:
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    workers = [int(path.stem) for path in started]
    while any(Path(f"/proc/{pid}").exists() and "Z" not in status(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


def sleep_long(folder: str, number: int) -> None:
    (Path(folder) / f"{os.getpid()}.pid").touch()
    time.sleep(600)


def status(pid: int) -> str:
    try:
        return next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("State"))
    except OSError:
        return "Z"
