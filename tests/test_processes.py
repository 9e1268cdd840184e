"""Calls in other processes: where they run, what their errors become, and that nothing outlives a killed parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import current_process, parent_process
from pathlib import Path

import pytest
from runs import ROOT

from shards.layout import DataError
from shards.processes import Processes, Stopped, call_each, tell


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


def names_of_semaphores(_: int) -> set[str]:
    """Semaphores that this process, the one that made it and the first one have mapped and that still have a name."""
    pids = {os.getpid(), os.getppid(), (parent_process() or current_process()).pid}
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    return {line.split()[-1] for line in lines if "/dev/shm/sem." in line and not line.endswith("(deleted)")}


def test_no_semaphore_is_left_behind_by_a_kill():
    """A name in /dev/shm outlives a process group that is killed; without one nothing can."""
    before = names_of_semaphores(0)  # those of other libraries in this process
    for _, future in call_each(names_of_semaphores, [(n,) for n in range(4)], 2):
        assert future.result() <= before


def tell_forever(folder: str) -> None:
    while True:
        tell(os.getpid())
        (Path(folder) / "told").touch()
        time.sleep(0.01)


def test_what_is_told_arrives_and_an_exception_stops_the_calls(tmp_path):
    told = []
    with pytest.raises(KeyboardInterrupt), Processes(2, []) as processes:
        running = processes.submit(tell_forever, str(tmp_path), news=told.append)
        while len(told) < 5:
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert isinstance(running.exception(), Stopped)
    assert len(set(told)) == 1 and not Path(f"/proc/{told[0]}").exists()


def test_a_second_interrupt_leaves_nothing_to_wait_for(tmp_path):
    """It cuts the orderly end short, while one process is idle and another is slow to answer."""
    script = tmp_path / "parent.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        "from test_processes import tell_slowly\nfrom shards.processes import Processes\n"
        "if __name__ == '__main__':\n"
        "    with Processes(2, []) as processes:\n"
        f"        processes.submit(tell_slowly, {str(tmp_path)!r}, 0).result()\n"
        f"        processes.submit(abs, 1), processes.submit(tell_slowly, {str(tmp_path)!r}, 5).result()\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "5").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    for _ in range(2):
        time.sleep(0.5)
        parent.send_signal(signal.SIGINT)
    try:
        assert parent.wait(60) != 0
    finally:
        parent.kill()


def tell_slowly(folder: str, seconds: float) -> None:
    (Path(folder) / str(seconds)).touch()
    time.sleep(seconds)
    tell(seconds)


def test_calls_that_have_not_begun_are_cancelled(tmp_path):
    with pytest.raises(KeyboardInterrupt), Processes(1, []) as processes:
        running = processes.submit(tell_forever, str(tmp_path))
        waiting = processes.submit(sleep_long, str(tmp_path), 0)
        while not (tmp_path / "told").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt
    assert isinstance(running.exception(), Stopped) and waiting.cancelled()


def test_a_death_costs_only_its_own_call():
    with Processes(1, []) as processes:
        dying, living = processes.submit(die, 0), processes.submit(abs, -3)
        with pytest.raises(BrokenProcessPool, match="ended with exit status -9"):
            dying.result()
        assert living.result() == 3


class Untold(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__(threading.Lock())


def raise_untold() -> None:
    raise Untold


def test_an_error_that_cannot_travel_is_told():
    with Processes(1, []) as processes:
        with pytest.raises(RuntimeError, match="Untold.* cannot be sent to the parent"):
            processes.submit(raise_untold).result()
        assert processes.submit(abs, -3).result() == 3


def test_a_call_that_cannot_be_sent_harms_no_other():
    with Processes(1, []) as processes:
        with pytest.raises(Exception, match="pickle"):
            processes.submit(lambda: None).result()
        assert processes.submit(abs, -3).result() == 3
    with pytest.raises(ValueError, match="no news"), Processes(1, []) as processes:
        processes.submit(tell_forever, "/nowhere", news=no_news).result()


def no_news(told: object) -> None:
    raise ValueError("no news")
