"""Faults on purpose: what MASKWRIGHT_FAULT understands, and that every point is a place in the program."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from engine.fault_points import ACTIONS, POINTS, Fault, parse_faults

ROOT = Path(__file__).resolve().parents[1]


def test_the_variable_is_read_part_by_part():
    assert parse_faults("") == ()
    assert parse_faults("save.manifest:kill@2#1; step.loss:nan") == (
        Fault("save.manifest", "kill", 2, 1),
        Fault("step.loss", "nan", 1, None),
    )


@pytest.mark.parametrize(
    "text", ["save", "save.manifest:melt", "nowhere:kill", "step.loss:nan@x", "step.loss:nan@1#-1"]
)
def test_what_is_no_fault_is_refused(text):
    with pytest.raises(ValueError, match="POINT:ACTION"):
        parse_faults(text)


def visit(fault: str, *points: str, rank: str = "0") -> subprocess.CompletedProcess:
    code = (
        "import sys; from engine.fault_points import reached\nfor p in sys.argv[1:]: print(p, reached(p), flush=True)"
    )
    environment = {"MASKWRIGHT_FAULT": fault, "RANK": rank, "PATH": ""}
    command = [sys.executable, "-c", code, *points]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("action", "code"), [("kill", -9), ("term", -15), ("exit", 7), ("leave", 0), ("raise", 1), ("enospc", 1)]
)
def test_the_second_visit_of_the_right_rank_fails(action, code):
    points = ("step.begin", "step.done", "step.begin", "step.done")
    done = visit(f"step.begin:{action}@2#1", *points, rank="1")
    assert done.returncode == code and done.stdout == "step.begin False\nstep.done False\n"
    other = visit(f"step.begin:{action}@2#1", *points, rank="0")
    assert other.returncode == 0 and other.stdout.count("False") == 4
    assert (
        action not in ("raise", "enospc") or {"raise": "RuntimeError", "enospc": "No space left"}[action] in done.stderr
    )


def test_nan_is_left_to_the_caller():
    done = visit("step.loss:nan@2", "step.loss", "step.loss", "step.loss")
    assert done.stdout.split() == ["step.loss", "False", "step.loss", "True", "step.loss", "False"]


def test_every_point_is_reached_somewhere_and_every_place_is_a_point():
    places = set()
    for path in (ROOT / "engine").rglob("*.py"):
        places |= set(re.findall(r'\breached\("([a-z.]+)"\)', path.read_text()))
    assert places == set(POINTS) and "nan" in ACTIONS
