"""What a run says: rich progress in a terminal, plain lines elsewhere, and metrics.jsonl always. Rank 0 only."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"


class Console:
    """Progress and records of one run. On other ranks (`enabled=False`) every method does nothing."""

    def __init__(self, folder: Path, *, enabled: bool, total_steps: int, start_step: int) -> None:
        self.folder, self.enabled = folder, enabled
        self.rich = RichConsole(highlight=False, soft_wrap=True)
        self.progress: Progress | None = None
        if not enabled:
            return
        for name in (METRICS, EVALUATIONS):
            forget_after(folder / name, start_step)
        if is_interactive():
            self.progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=self.rich,
            )
            self.task = self.progress.add_task("step", total=total_steps, completed=start_step, numbers="")
            self.progress.start()

    def say(self, text: str) -> None:
        """A line for the reader."""
        if self.enabled:
            self.rich.print(text, markup=False)

    def advance(self, step: int) -> None:
        """`step` optimizer steps are done."""
        if self.progress:
            self.progress.update(self.task, completed=step)

    def log(self, record: dict, seconds_left: float) -> None:
        """A training record: to metrics.jsonl and to the screen."""
        if not self.enabled:
            return
        append(self.folder / METRICS, record)
        numbers = format_record(record)
        if self.progress:
            self.progress.update(self.task, completed=record["step"], numbers=numbers)
        else:
            self.say(f"step {record['step']}  {numbers}  left {format_duration(seconds_left)}")

    def log_evaluation(self, record: dict) -> None:
        """An evaluation: to evaluations.jsonl and to the screen."""
        if self.enabled:
            append(self.folder / EVALUATIONS, record)
            scores = "  ".join(f"{name} {value:.2f} %" for name, value in record.items() if name != "step")
            self.say(f"step {record['step']}  {scores}")

    def close(self) -> None:
        if self.progress:
            self.progress.stop()


def is_interactive() -> bool:
    """Whether a moving progress bar makes sense here."""
    silenced = "CI" in os.environ or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not silenced


def format_record(record: dict) -> str:
    parts = [f"{name} {record[name]:.4f}" for name in loss_names(record)]
    parts.append(f"lr {record['lr']:.2e}")
    parts.append(f"grad {record['grad_norm']:.3f}")
    parts.append(f"{record['images_per_second']:,.0f} img/s")
    parts.append(f"data {100 * record['data_wait']:.0f} %")
    return "  ".join(parts)


def loss_names(record: dict) -> list[str]:
    """`loss` and its parts, in the order in which the objective gave them."""
    other = {"step", "loss_hex", "lr", "grad_norm", "images_per_second", "data_wait"}
    return [name for name in record if name not in other]


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def append(path: Path, record: dict) -> None:
    """One JSON object on one line; a full disk must not end the training (specs: faults, D5)."""
    try:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        print(f"warning: {path}: {error}", file=sys.stderr)


def forget_after(path: Path, step: int) -> None:
    """Drop records beyond `step`: a resumed run writes them again, bit for bit."""
    if not path.exists():
        return
    kept = [line for line in path.read_text().splitlines() if record_step(line) <= step]
    replacement = path.with_suffix(".tmp")
    replacement.write_text("".join(line + "\n" for line in kept))
    os.replace(replacement, path)


def record_step(line: str) -> float:
    """The step of a record; a line cut by a kill belongs to no step and is dropped."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")
