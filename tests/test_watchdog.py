"""Data that do not come end the run: one line, the stacks of all threads, an exit code; never silence."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, TIMEOUT, TINY, environment, launch

from engine.feeding import patience
from engine.runtime import Runtime
from recipes import registry
from recipes.overrides import apply_overrides
from shards.reading.watchdog import GRACE, Watchdog

SCRIPT = ROOT / "tests" / "stalled_source.py"
SECONDS = 3


def stalled(folder: Path, how: str, seconds: float = SECONDS) -> subprocess.CompletedProcess:
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    return subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), how, str(seconds)],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip


@pytest.mark.parametrize("how", ["thread", "library"])
def test_a_wait_that_is_too_long_is_told_and_ends_the_process(how: str, tmp_path: Path) -> None:
    done = stalled(tmp_path, how)
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "batch 4"
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"data.timeout={SECONDS}: rank 0 has waited" in line and "a batch of step 6, " in line
    assert "set 00" in line and str(tmp_path) in line
    assert "most recent call first" in done.stderr and "in next_batch" in done.stderr


def test_an_evaluation_is_watched_too(tmp_path: Path) -> None:
    done = stalled(tmp_path, "evaluation")
    assert done.returncode == 1 and "rank 3 has waited so many seconds for a batch of the evaluation" in done.stderr


def test_a_library_that_holds_the_interpreter_is_ended_too(tmp_path: Path) -> None:
    began = time.monotonic()
    done = stalled(tmp_path, "interpreter")
    assert done.returncode == 1 and time.monotonic() - began < 100
    assert "Timeout (0:00:08)!" in done.stderr and "in next_batch" in done.stderr
    assert GRACE + SECONDS == 8


@pytest.mark.parametrize("seconds", [SECONDS, 0])
def test_nothing_happens_while_batches_come_and_between_them(seconds: float, tmp_path: Path) -> None:
    done = stalled(tmp_path, "never", seconds)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert len(done.stdout.splitlines()) == 12


@pytest.mark.long  # two ranks until a time limit
def test_the_rank_that_waits_is_named_and_the_launcher_ends_all(shards: Path, tmp_path: Path) -> None:
    command = launch(
        SCRIPT, "library", "--recipe", "vit_ti_mae_demo", *TINY, f"data.train={shards}/train", "run.steps=20",
        f"run.out={tmp_path}/run", "data.timeout=10", launcher="torchrun", ranks=2,
    )  # fmt: skip
    variables = environment(tmp_path) | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=variables)
    assert done.returncode != 0
    assert "rank 1 has waited so many seconds for a batch of step 6" in done.stderr
    assert "rank 0 has waited" not in done.stderr


def test_a_line_that_cannot_be_made_does_not_keep_the_process(tmp_path: Path) -> None:
    code = "import time; from shards.reading.watchdog import Watchdog\nwith Watchdog(1, lambda: 1 / 0): time.sleep(60)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, cwd=ROOT)
    assert done.returncode == 1 and "cannot be told: division by zero" in done.stderr


def test_closing_ends_the_watch() -> None:
    watchdog = Watchdog(0.01, lambda: "too late")
    watchdog.close()
    with watchdog:
        time.sleep(0.1)
    watchdog.close()


@pytest.mark.parametrize(
    ("timeout", "world_size", "expected"), [(600.0, 1, 600.0), (600.0, 2, 240.0), (30.0, 8, 30.0), (0.0, 8, 0.0)]
)
def test_among_ranks_the_one_that_waits_speaks_first(timeout: float, world_size: int, expected: float) -> None:
    """The collectives of the others give up after 300 seconds."""
    runtime = Runtime(0, world_size, 0, world_size, None)
    recipe = apply_overrides(registry.load("vit_ti_mae_demo"), [f"data.timeout={timeout}"])
    assert patience(recipe, runtime) == expected
