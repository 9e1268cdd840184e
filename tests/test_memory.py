"""Many epochs leave nothing behind: memory, files, threads, mappings and shared memory stay as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from statistics import median

import pytest
from runs import ROOT

MIB = 2**20


def epochs(folder: Path, number: int, state: str) -> list[dict]:
    """The states before the first epoch, after each, and after the end."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "memory_worker.py"), str(folder), str(number), state],
        capture_output=True, text=True, timeout=900, env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == number + 2
    return lines


def slope(values: list[float]) -> float:
    """Growth per step: the median over all pairs, which single outliers do not move (Theil and Sen)."""
    return median((b - a) / (j - i) for (i, a), (j, b) in combinations(enumerate(values), 2))


@pytest.mark.parametrize(
    ("state", "number", "warm", "most"),
    [
        ("whole", 14, 4, 3.0),
        ("damaged", 14, 4, 3.0),  # failed pipelines are built again in every epoch
        pytest.param("whole", 200, 120, 0.3, marks=pytest.mark.long),
        pytest.param("damaged", 200, 120, 0.3, marks=pytest.mark.long),
    ],
)
def test_nothing_grows(state: str, number: int, warm: int, most: float, tmp_path: Path) -> None:
    """One kept batch a segment would be 4 MiB an epoch; allocators fill their pools for about a hundred epochs."""
    lines = epochs(tmp_path, number, state)
    before, during, after = lines[0], lines[1:-1], lines[-1]
    assert slope([line["resident"] / MIB for line in during[warm:]]) < most
    for what in ("files", "threads", "mapped"):
        assert after[what] <= before[what], what
    assert max(line["files"] for line in during) <= before["files"] + 16  # for moments: eight readers, a lock, pools
    assert max(line["mapped"] for line in during) <= 3 * 8  # 8 tars, three pipelines
    assert after["shared memory"] == []
