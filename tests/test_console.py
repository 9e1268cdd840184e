"""What a run says and keeps: a bar that never cuts a step or a time, and records that stay whole JSON."""

from __future__ import annotations

import io
import json
import math
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from engine import console
from engine.console import EVALUATIONS, METRICS, Console, append, forget_after, format_record, is_interactive

RECORD = {
    "step": 235, "loss": 1.23456, "mae": 0.5, "lr": 1.5e-3, "grad_norm": 2.0, "images_per_second": 1234.4,
    "data_wait": 0.12, "loss_hex": "0x1p0",
}  # fmt: skip
EVERYTHING = "loss 1.2346  mae 0.5000  1,234 img/s  data 12 %  lr 1.50e-03  grad 2.000"


class Terminal:
    """A bar on a screen of some width, with a clock that stands still until it is set."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, width: int, total_steps: int) -> None:
        self.out, self.now = io.StringIO(), 0.0
        screen = dict(width=width, force_terminal=True, file=self.out, color_system=None)
        monkeypatch.setattr(console, "RichConsole", lambda **settings: RichConsole(**settings, **screen))
        monkeypatch.setattr(console, "is_interactive", lambda: True)
        self.console = Console(folder, enabled=True, total_steps=total_steps, start_step=0)
        self.progress = self.console.progress
        self.progress.live.auto_refresh = False
        self.progress.get_time = lambda: self.now
        self.progress.tasks[0].start_time = 0.0
        self.progress.tasks[0].get_time = self.progress.get_time

    def line(self) -> str:
        """The bar as it stands, from a screen that is drawn anew."""
        self.out.seek(0)
        self.out.truncate()
        self.progress.refresh()
        return self.out.getvalue().replace("\x1b[2K", "").strip("\r\n")


@pytest.fixture
def terminal(tmp_path, monkeypatch):
    opened = []

    def opens(width: int, total_steps: int = 1200) -> Terminal:
        opened.append(Terminal(tmp_path, monkeypatch, width, total_steps))
        return opened[-1]

    yield opens
    for one in opened:
        one.console.close()


def train_to(terminal: Terminal, step: int, seconds: float) -> None:
    for done in range(1, step + 1):
        terminal.now += seconds
        terminal.console.advance(done)


# --- the bar --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_step_and_time_left_are_never_cut(terminal, width):
    """499,765 steps of 1.5 s are 208 hours: the longest texts that a run shows."""
    screen = terminal(width, total_steps=500_000)
    train_to(screen, 235, 1.5)
    screen.console.log(RECORD, seconds_left=None)
    line = screen.line()
    assert len(line) <= width and "   235/500000 " in line and line.endswith("208:14:08")
    numbers = line.partition("/500000")[2].removesuffix("208:14:08").strip()
    parts = EVERYTHING.split("  ")
    assert numbers in ["  ".join(parts[:count]) for count in range(len(parts) + 1)]  # whole numbers only
    assert numbers == EVERYTHING or width < 200
    assert numbers or width < 60


def test_the_loss_is_in_80_columns(terminal):
    screen = terminal(80)
    train_to(screen, 235, 1.0)
    screen.console.log(RECORD, seconds_left=None)
    assert "━" in screen.line() and " 235/1200 loss 1.2346  mae 0.5000  1,234 img/s " in screen.line()
    assert screen.line().endswith(" 0:16:05")


def test_before_the_first_step_no_time_is_claimed(terminal):
    line = terminal(80).line()
    assert "   0/1200" in line and ":" not in line


def test_work_between_steps_is_shown_and_passes(terminal):
    screen = terminal(80)
    screen.console.log(RECORD, seconds_left=None)
    with pytest.raises(KeyError), screen.console.working("k-NN of 50,000 images"):
        assert "k-NN of 50,000 images  0:00:00" in screen.line() and "loss" not in screen.line()
        raise KeyError
    assert "k-NN" not in screen.line() and "loss 1.2346" in screen.line()


@pytest.mark.parametrize(
    ("tty", "environment", "expected"),
    [
        (True, {"TERM": "xterm"}, True),
        (False, {"TERM": "xterm"}, False),
        (True, {"TERM": "dumb"}, False),
        (True, {"TERM": "xterm", "CI": "true"}, False),
        (False, {"FORCE_COLOR": "1"}, False),
    ],
)
def test_a_bar_is_for_terminals(monkeypatch, tty, environment, expected):
    for name in ("CI", "TERM", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: tty)
    assert is_interactive() is expected


# --- plain lines ----------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(tmp_path, monkeypatch) -> Console:
    monkeypatch.setattr(console, "is_interactive", lambda: False)
    return Console(tmp_path, enabled=True, total_steps=1200, start_step=0)


def test_a_plain_line_has_everything(plain, capsys):
    plain.log(RECORD, seconds_left=3661.4)
    assert capsys.readouterr().out == f"step 235  {EVERYTHING}  left 1:01:01\n"


@pytest.mark.parametrize("unknown", [None, math.inf, math.nan])
def test_a_time_that_is_not_known_is_left_out(plain, capsys, unknown):
    plain.log(RECORD, seconds_left=unknown)
    assert capsys.readouterr().out == f"step 235  {EVERYTHING}\n"


def test_long_work_is_announced_once_and_short_work_is_not(plain, monkeypatch):
    said, heard = [], threading.Event()
    monkeypatch.setattr(plain, "say", lambda text: (said.append(text), heard.set()))
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    with plain.working("k-NN of 50,000 images"):
        assert heard.wait(30)
    monkeypatch.setattr(console, "PATIENCE", 3600.0)
    threads = threading.active_count()
    with plain.working("saving"):
        assert threading.active_count() == threads + 1
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(30)
    assert said == ["k-NN of 50,000 images ..."] and threading.active_count() == threads


def test_other_ranks_say_and_write_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    (tmp_path / METRICS).write_text("theirs\n")
    quiet = Console(tmp_path, enabled=False, total_steps=10, start_step=0)
    quiet.advance(1)
    quiet.log(RECORD, seconds_left=1.0)
    quiet.log_evaluation({"step": 1, "knn": 50.0})
    with quiet.working("k-NN"):
        assert not any(isinstance(thread, threading.Timer) for thread in threading.enumerate())
    quiet.close()
    assert capsys.readouterr() == ("", "") and [path.name for path in tmp_path.iterdir()] == [METRICS]
    assert (tmp_path / METRICS).read_text() == "theirs\n"


@pytest.mark.parametrize(("value", "shown"), [(math.nan, "nan"), (math.inf, "inf"), (None, "-")])
def test_a_gradient_norm_that_is_no_number_is_shown_and_kept_as_null(plain, tmp_path, value, shown):
    record = RECORD | {"grad_norm": value, "mae": value}
    assert f"grad {shown}" in format_record(record) and f"mae {shown}" in format_record(record)
    plain.log(record, seconds_left=None)
    plain.log(RECORD, seconds_left=None)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert lines == [RECORD | {"grad_norm": None, "mae": None}, RECORD]


# --- records --------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_told_once_per_file_and_stops_nothing(plain, tmp_path, capsys):
    for name in (METRICS, EVALUATIONS):
        (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        append(tmp_path / METRICS, RECORD)
    for _ in range(3):
        plain.log(RECORD, seconds_left=None)
        plain.log_evaluation({"step": 235, "knn": 50.0})
    out, err = capsys.readouterr()
    assert out.count("loss 1.2346") == 3 and out.count("knn 50.00 %") == 3
    assert [line.count("No space left") for line in err.splitlines()] == [1, 1]
    assert METRICS in err.splitlines()[0] and EVALUATIONS in err.splitlines()[1]


def test_a_record_that_fits_in_part_leaves_nothing(tmp_path, monkeypatch):
    """A disk that is full after half a line: the next record must not be glued to that half."""
    path = tmp_path / METRICS
    append(path, {"step": 1})

    class HalfFull(io.FileIO):
        def write(self, data: bytes) -> int:
            return super().write(data[: len(data) // 2])

    monkeypatch.setattr(console, "open", lambda path, mode, buffering: HalfFull(path, mode), raising=False)
    with pytest.raises(OSError, match="No space left"):
        append(path, {"step": 2})
    monkeypatch.undo()
    append(path, {"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def lines(*steps: int) -> str:
    return "".join(f'{{"step": {step}, "knn": 1.0}}\n' for step in steps)


@pytest.mark.parametrize(
    ("before", "step", "after"),
    [
        (lines(0, 10, 20, 30), 20, lines(0, 10, 20)),
        (lines(0, 10, 20), 30, lines(0, 10, 20)),
        (lines(0, 10) + '{"step": 20, "kn', 20, lines(0, 10)),  # cut by a kill
        (lines(10) + '[1]\n"x"\n{"stop": 1}\n{"step": null}\n{"step": "x"}\n{"step": NaN}\n\n', 20, lines(10)),
        ("", 20, ""),
        (lines(0), 0, ""),  # killed before the first checkpoint: the evaluation at step 0 is made again
        (lines(0, 10) + '{"st', 0, ""),
    ],
)
def test_a_resumed_run_forgets_what_it_will_write_again(tmp_path, before, step, after):
    path = tmp_path / EVALUATIONS
    path.write_text(before)
    forget_after(path, step)
    assert path.read_text() == after and [found.name for found in tmp_path.iterdir()] == [EVALUATIONS]


def test_bytes_that_are_no_text_are_forgotten(tmp_path):
    path = tmp_path / METRICS
    path.write_bytes(lines(10).encode() + b"\x00\xff\xfe\x00\n" + lines(20).encode())
    forget_after(path, 20)
    assert path.read_text() == lines(10, 20)


def test_records_on_a_full_disk_stay_as_they_were(tmp_path):
    path = tmp_path / METRICS
    path.write_text(lines(10, 20, 30))
    path.with_suffix(".tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: .*metrics.jsonl"):
        forget_after(path, 20)
    assert path.read_text() == lines(10, 20, 30) and [found.name for found in tmp_path.iterdir()] == [METRICS]


def test_there_may_be_nothing_to_forget(tmp_path):
    forget_after(tmp_path / METRICS, 20)
    assert not list(tmp_path.iterdir())


def test_opening_the_console_forgets_in_both_files(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "is_interactive", lambda: False)
    for name in (METRICS, EVALUATIONS):
        (tmp_path / name).write_text(lines(0, 10, 20))
    Console(tmp_path, enabled=True, total_steps=30, start_step=10)
    assert (tmp_path / METRICS).read_text() == (tmp_path / EVALUATIONS).read_text() == lines(0, 10)
