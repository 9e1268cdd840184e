"""Ours and theirs on the same work, in one process tree, turn by turn, as one row of a table."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison; `ratio` above 1 says that ours is faster."""

    name: str
    ratio: float
    ours: float
    theirs: float
    unit: str  # of both


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a suite is run with. Raises ValueError for impossible values."""

    rounds: int = ROUNDS  # that count; one more before them does not
    workers: int = 2  # processes, where a suite compares several
    scale: float = 1.0  # of the sets that a suite makes; below 1 for a quick look
    reference: Path | None = None  # clones dtm/ and lut/ of the released programs; None: textbook forms stand for them
    recipes: tuple[str, ...] = ()  # gpu: which; none: all
    rehearse: bool = False  # gpu: with tiny models, where there is no GPU, to see whether it runs

    def __post_init__(self) -> None:
        for name in ("rounds", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if not 0 < self.scale <= 100:
            raise ValueError(f"scale={self.scale:g}: a number above 0 and up to 100 is needed")
        for name in ("dtm", "lut") if self.reference else ():
            if not (self.reference / name).is_dir():
                raise ValueError(f"reference={self.reference}: holds no folder {name}; git clone naver-ai/{name} there")

    def scaled(self, number: int, least: int = 1) -> int:
        """`number` things at this scale."""
        return max(least, round(number * self.scale))


def interleaved(
    works: Sequence[Callable[[], object]], rounds: int, clock: Callable[[], float] | None = None
) -> list[float]:
    """Median seconds of each, one after the other in every round; the first round is not counted.

    `clock` is that on the wall; `time.process_time` counts what this process and its threads worked, whatever else runs
    on the machine, and not what its child processes did.
    """
    clock = clock or time.perf_counter
    spent: list[list[float]] = [[] for _ in works]
    for _ in range(rounds + 1):
        for work, seconds in zip(works, spent, strict=True):
            began = clock()
            work()
            seconds.append(clock() - began)
    return [statistics.median(seconds[1:]) for seconds in spent]


def compared(name: str, amount: float, seconds: list[float], unit: str) -> Row:
    """The rates of two that did the same amount of work in these seconds."""
    ours, theirs = (amount / spent for spent in seconds)
    return Row(name=name, ratio=ours / theirs, ours=ours, theirs=theirs, unit=unit)


def smaller(name: str, ours: float, theirs: float, unit: str) -> Row:
    """Amounts of which less is better: bytes, operators, seconds."""
    return Row(name=name, ratio=theirs / ours, ours=ours, theirs=theirs, unit=unit)
