"""A run that was broken off and resumed is the run that was not, to the last bit of every loss.

Real kills of whole trainings are in test_training.py.
"""

from __future__ import annotations

import json
import random
import subprocess
from itertools import combinations, product
from pathlib import Path

import pytest
from runs import ROOT, TIMEOUT, TINY, Finished, environment, launch

METHODS = ("mae", "lut", "dtm")
STAGES = ("0_fp32", "1_bf16", "2_bf16", "3_bf16")
RANKS = (1, 2)
PLACES = ("first", "accumulation", "epoch", "last")
FACTORS = (METHODS, STAGES, RANKS, PLACES)
STEPS, EPOCH = 4, 2  # steps; 80 images in batches of 32
MICRO = 8
Row = tuple[str, str, int, str]

# Every value of every factor beside every value of every other one; the test below counts.
PAIRWISE: list[Row] = [
    ("mae", "0_fp32", 1, "first"), ("lut", "0_fp32", 2, "accumulation"), ("dtm", "0_fp32", 1, "epoch"),
    ("mae", "0_fp32", 2, "last"), ("lut", "1_bf16", 2, "first"), ("dtm", "1_bf16", 1, "accumulation"),
    ("mae", "1_bf16", 2, "epoch"), ("lut", "1_bf16", 1, "last"), ("dtm", "2_bf16", 2, "first"),
    ("mae", "2_bf16", 1, "accumulation"), ("lut", "2_bf16", 2, "epoch"), ("dtm", "2_bf16", 1, "last"),
    ("mae", "3_bf16", 1, "first"), ("mae", "3_bf16", 2, "accumulation"), ("lut", "3_bf16", 1, "epoch"),
    ("dtm", "3_bf16", 2, "last"),
]  # fmt: skip


def pairs(rows: list[Row]) -> set[tuple]:
    """All pairs of values of two different factors that stand in one row."""
    return {(a, row[a], b, row[b]) for row in rows for a, b in combinations(range(len(FACTORS)), 2)}


def test_the_selection_covers_every_pair():
    every = pairs(list(product(*FACTORS)))
    assert pairs(PAIRWISE) == every, every - pairs(PAIRWISE)
    assert len(PAIRWISE) == 16, "16 is the least: four stages beside four places"


# --- the runs -------------------------------------------------------------------------------------------------------


def arguments(row: Row, data: Path, *, resume: bool = False) -> list[str]:
    """The command of a row's run, without its folder and without the kill."""
    method, stage, _, _ = row
    level, precision = stage.split("_")
    tiny = [setting for setting in TINY if method != "dtm" or not setting.startswith("objective.decoder")]
    own = {
        "mae": [],
        "lut": ["objective.head_hidden=32"],
        "dtm": ["teacher=pixels", "objective.images_per_draw=4"],
    }[method]
    return [
        "--recipe", f"vit_ti_{method}_demo", *tiny, *own, f"data.train={data}", f"run.steps={STEPS}",
        "run.save_every=1", "run.keep=1", "optim.global_batch=32", f"optim.micro_batch={MICRO}", f"zero.stage={level}",
        f"precision={precision}", "zero.param_persistence_threshold=0", *(["--resume"] if resume else []),
    ]  # fmt: skip


def fault(row: Row, luck: random.Random) -> str:
    """Where a row's run is broken off; the newest checkpoint is of the step before."""
    _, _, ranks, place = row
    micro_steps = 32 // (MICRO * ranks)
    inside = luck.randrange(1, STEPS) * micro_steps + luck.randrange(1, micro_steps)
    point, number = {
        "first": ("save.published", 1),  # step 1 is done and saved
        "accumulation": ("step.gradient", inside),  # of a random step but the first
        "epoch": ("step.begin", EPOCH + 1),
        "last": ("step.update", STEPS),
    }[place]
    return f"{point}:raise@{number}"


def alone(shards: Path, folder: Path) -> Path:
    """The training shards without `val` beside them, so that nothing is evaluated."""
    (folder / "train").symlink_to(shards / "train")
    return folder / "train"


def run_rows(rows: list[Row], ranks: int, shards: Path, folder: Path) -> None:
    """Of every row the whole run, the broken one and its resume. Stage 3 comes last: it changes torch for good."""
    data = alone(shards, folder)
    plan, luck = [], random.Random(6)
    for row in sorted(rows, key=lambda row: row[1].startswith("3")):
        name, whole = "_".join(map(str, row)), "_".join(["whole", row[0], row[1], str(ranks)])
        if whole not in {entry[0] for entry in plan}:
            plan.append((whole, arguments(row, data), ""))
        plan.append((name, arguments(row, data), fault(row, luck)))
        plan.append((name, arguments(row, data, resume=True), ""))
    (folder / f"plan_{ranks}.json").write_text(json.dumps(plan))
    command = launch(
        ROOT / "tests" / "resume_worker.py", str(folder), str(folder / f"plan_{ranks}.json"),
        launcher="torchrun" if ranks > 1 else "python", ranks=ranks,
    )  # fmt: skip
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        cwd="/",
        env=environment(folder) | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


def check_rows(rows: list[Row], folder: Path) -> None:
    for row in rows:
        whole = Finished(0, "", folder / "_".join(["whole", row[0], row[1], str(row[2])]))
        resumed = Finished(0, "", folder / "_".join(map(str, row)))
        assert list(whole.losses) == list(range(1, STEPS + 1))
        assert resumed.losses == whole.losses, row


@pytest.mark.parametrize("ranks", RANKS)
def test_broken_off_and_resumed_has_the_same_bits(ranks, shards, tmp_path):
    rows = [row for row in PAIRWISE if row[2] == ranks]
    run_rows(rows, ranks, shards, tmp_path)
    check_rows(rows, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("ranks", RANKS)
def test_every_combination_has_the_same_bits(ranks, shards, tmp_path):
    rows = [row for row in product(*FACTORS) if row[2] == ranks]
    run_rows(rows, ranks, shards, tmp_path)
    check_rows(rows, tmp_path)
