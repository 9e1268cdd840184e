"""How soon a command answers: what asks only for a list or for help, beside `import torch` in a fresh interpreter.

Seconds are of the processor, of the process that was started and of its children.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tools.benchmarks.side_by_side import Row, Settings, interleaved, smaller

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = (
    "engine/train.py --list",
    "engine/train.py --help",
    "tools/recipe.py --help",
    "tools/make_shards.py --help",
    "tools/verify_shards.py --help",
    "tools/benchmark.py --help",
)


def suite(settings: Settings) -> Iterator[Row]:
    """A row per command: milliseconds, of which less is better."""
    works: list[Callable[[], str]] = [lambda: answer("-c", "import torch")]
    for command in COMMANDS:
        works.append(lambda command=command: answer(*command.split()))
        if not works[-1]().strip():
            raise RuntimeError(f"{command}: says nothing, so that it is soon done proves nothing")
    torch, *ours = interleaved(works, settings.rounds, children_seconds)
    for command, seconds in zip(COMMANDS, ours, strict=True):
        yield smaller(f"{command}, against import torch", 1000 * seconds, 1000 * torch, "CPU ms")


def answer(*arguments: str) -> str:
    """What a new interpreter says; RuntimeError with its last line where it fails."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.splitlines() or ["nothing on stderr"])[-1]
        raise RuntimeError(f"{' '.join(arguments)}: ended with exit code {done.returncode}: {last}")
    return done.stdout


def children_seconds() -> float:
    """Processor time of the children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
