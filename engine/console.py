"""What a run says: rich progress in a terminal, plain lines elsewhere, and metrics.jsonl always. Rank 0 only."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
PATIENCE = 2.0  # seconds; work that takes longer is announced where there is no bar
BAR_WIDTH = 16  # characters, so that 80 columns hold the numbers too


class Console:
    """Progress and records of one run. On other ranks (`enabled=False`) there is only what `note` is told."""

    def __init__(
        self,
        folder: Path,
        *,
        enabled: bool,
        total_steps: int,
        start_step: int,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        """`note` is told of every line but those of metrics.jsonl: the log of this rank."""
        self.folder, self.enabled, self.note = folder, enabled, note
        self.rich = RichConsole(highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        self.unwritable: set[str] = set()  # records that were lost once, and warned about
        if not enabled:
            return
        for name in (METRICS, EVALUATIONS):
            forget_after(folder / name, start_step)
        if is_interactive():
            self.progress = progress_bar(self.rich)
            self.task = self.progress.add_task("step", total=total_steps, completed=start_step, numbers=Parts(list))
            self.progress.start()

    def say(self, text: str) -> None:
        """A line for the reader, and for the log."""
        self.note(text)
        self.show(text)

    def show(self, text: str) -> None:
        """A line for the reader alone."""
        if self.enabled:
            self.rich.print(text, markup=False)

    def advance(self, step: int) -> None:
        """`step` optimizer steps are done."""
        if self.progress:
            self.progress.update(self.task, completed=step)

    def log(self, record: dict, seconds_left: float | None) -> None:
        """A training record: to metrics.jsonl and to the screen; None: the time left is not known."""
        if not self.enabled:
            return
        self.keep(METRICS, record)
        parts = format_record(record)
        if self.progress:
            self.progress.update(self.task, completed=record["step"], numbers=Parts(lambda: parts))
        else:
            known = seconds_left is not None and math.isfinite(seconds_left)
            left = [f"left {format_duration(seconds_left)}"] if known else []
            self.show("  ".join([f"step {record['step']}", *parts, *left]))

    def log_evaluation(self, record: dict) -> None:
        """An evaluation: to evaluations.jsonl and to the screen."""
        if self.enabled:
            self.keep(EVALUATIONS, record)
            scores = "  ".join(f"{name} {value:.2f} %" for name, value in record.items() if name != "step")
            self.say(f"step {record['step']}  {scores}")

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Tell that something other than steps is being done: in the bar, or as a line if it takes long."""
        if self.progress:
            began, numbers = time.monotonic(), self.progress.tasks[self.task].fields["numbers"]
            clock = Parts(lambda: [text, format_duration(time.monotonic() - began)])
            self.progress.update(self.task, numbers=clock)
            try:
                yield
            finally:
                self.progress.update(self.task, numbers=numbers)
            return
        announcement = threading.Timer(PATIENCE, self.say, [f"{text} ..."])
        announcement.daemon = True
        if self.enabled:
            announcement.start()
        try:
            yield
        finally:
            announcement.cancel()

    def keep(self, name: str, record: dict) -> None:
        """Append to a file of records; a full disk is told once and must not end the training."""
        try:
            append(self.folder / name, record)
        except OSError as error:
            if name not in self.unwritable:
                warning = f"warning: {self.folder / name}: {error.strerror}; records are lost"
                self.note(warning)
                print(warning, file=sys.stderr)
            self.unwritable.add(name)

    def close(self) -> None:
        if self.progress:
            self.progress.stop()


# --- the bar --------------------------------------------------------------------------------------------------------


def progress_bar(screen: RichConsole) -> Progress:
    """Steps and time left are never cut; where the line is narrow, bar and numbers give way."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=BAR_WIDTH),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        NumbersColumn(),
        TimeLeftColumn(table_column=Column(no_wrap=True)),
        console=screen,
    )


class NumbersColumn(ProgressColumn):
    """The task's field `numbers`, which renders itself."""

    def render(self, task: Task) -> Parts:
        return task.fields["numbers"]


class TimeLeftColumn(TimeRemainingColumn):
    """Time left, and nothing while it is not known."""

    def render(self, task: Task) -> Text:
        return Text() if task.time_remaining is None else super().render(task)


class Parts:
    """As many texts as fit on the line, the first ones first; a number is shown whole or not at all."""

    def __init__(self, parts: Callable[[], list[str]]) -> None:
        self.parts = parts  # asked anew at every refresh

    def __rich_measure__(self, screen: RichConsole, options: ConsoleOptions) -> Measurement:
        return Measurement(0, len("  ".join(self.parts()))).with_maximum(options.max_width)

    def __rich_console__(self, screen: RichConsole, options: ConsoleOptions) -> RenderResult:
        parts = self.parts()
        while parts and len("  ".join(parts)) > options.max_width:
            parts = parts[:-1]
        yield Text("  ".join(parts), no_wrap=True)


def is_interactive() -> bool:
    """Whether a moving progress bar makes sense here."""
    silenced = "CI" in os.environ or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not silenced


# --- records --------------------------------------------------------------------------------------------------------


def format_record(record: dict) -> list[str]:
    """A training record in words, the most important first."""
    speed = f"{number(record['images_per_second'], ',.0f')} img/s"
    waiting = f"data {number(record['data_wait'], '.0%')}".replace("%", " %")
    losses = [f"{name} {number(record[name], '.4f')}" for name in loss_names(record)]
    use = [f"mfu {number(record['mfu'], '.0%')}".replace("%", " %")] if "mfu" in record else []
    rates = [f"lr {number(record['lr'], '.2e')}", f"grad {number(record['grad_norm'], '.3f')}"]
    return [*losses, speed, *use, waiting, *rates]


def number(value: float | None, form: str) -> str:
    """A number by its format; `-` where there is none (DeepSpeed has no gradient norm of a step that overflowed)."""
    return "-" if value is None else format(value, form)


def loss_names(record: dict) -> list[str]:
    """`loss` and its parts, in the order in which the objective gave them."""
    other = {"step", "loss_hex", "lr", "grad_norm", "images_per_second", "mfu", "data_wait"}
    return [name for name in record if name not in other]


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def append(path: Path, record: dict) -> None:
    """One JSON object on one line, whole or not at all; OSError where it cannot be written.

    JSON has no infinities: a number that is not finite becomes null.
    """
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
    line = (json.dumps(finite, allow_nan=False) + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                file.truncate(before)  # half a line would spoil the next one too
            raise


def forget_after(path: Path, step: int) -> None:
    """Drop the records that a run which goes on after `step` steps writes again, bit for bit; at step 0, all."""
    if not path.exists():
        return
    lines = path.read_text(errors="replace").splitlines() if step else []
    replace_text(path, "".join(line + "\n" for line in lines if record_step(line) <= step))


def replace_text(path: Path, text: str) -> None:
    """Let a file hold `text`, all of it; OSError naming it where that fails, and then it is as it was."""
    replacement = path.with_suffix(".tmp")
    try:
        replacement.write_text(text)
        os.replace(replacement, path)
    except OSError as error:
        with suppress(OSError):
            replacement.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def record_step(line: str) -> float:
    """The step of a record; a line cut by a kill belongs to no step and is dropped."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
