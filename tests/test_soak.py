"""The soak: its counters can count, and a short one is clean."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from runs import TIMEOUT, environment

from tools import soak
from tools.soak import Soak, Tally, emptied, losses

ROOT = Path(__file__).resolve().parents[1]


def record(run: Path, *values: str) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": step, "loss_hex": value}) for step, value in enumerate(values, start=1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 9, "lo')
    return run


@pytest.mark.parametrize(
    ("tally", "clean"),
    [
        (Tally(kills=3, resumes=2, resumes_exact=2), True),
        (Tally(), False),  # nothing was tried
        (Tally(kills=3, resumes=2, resumes_exact=1), False),
        (Tally(kills=3, hangs=1), False),
        (Tally(kills=3, orphans=1), False),
        (Tally(kills=3, checkpoints_lost=1), False),
    ],
)
def test_what_counts_as_clean(tally, clean):
    assert tally.is_clean() is clean


def test_the_result_is_one_line():
    tally = Tally(kills=5, resumes=4, resumes_exact=3, checkpoints_lost=2, hangs=1)
    assert tally.line() == "kills 5, resumes exact 3 of 4, checkpoints lost 2, hangs 1, orphans 0"


def test_the_record_is_json():
    assert json.loads(json.dumps(asdict(Tally(kills=1))))["ways"]["byte"] == 0


def test_another_loss_is_found_and_half_a_line_is_not_read(tmp_path):
    session = Soak(tmp_path, ranks=1, steps=3, seed=0)
    session.reference = losses(record(tmp_path / "reference", "0x1p+0", "0x1p+1"))
    record(tmp_path / "same", "0x1p+0", "0x1p+1")
    record(tmp_path / "other", "0x1p+0", "0x1.8p+1")
    assert session.is_good("same") and not session.tally.remarks
    assert not session.is_good("other") and "from step 2 on" in session.tally.remarks[0]


def sleeper(folder: Path) -> subprocess.Popen:
    """A process that looks like a rank, in a session of its own, where the strike does not find it."""
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", f"run.out={folder}"],
                            start_new_session=True)  # fmt: skip


def test_what_is_left_over_is_counted_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "LIMIT", 0.5)
    session = Soak(tmp_path, ranks=1, steps=3, seed=0)
    orphan, launcher = sleeper(tmp_path / "run"), sleeper(tmp_path / "elsewhere")
    session.wait_for_the_end(launcher, tmp_path / "run")
    assert (session.tally.hangs, session.tally.orphans) == (1, 1)
    assert orphan.wait(60) == -9 and launcher.poll() == -9


def test_one_bit_of_one_file_is_changed(tmp_path):
    (tmp_path / "a").write_bytes(b"\0" * 100)
    (tmp_path / "empty").touch()
    soak.spoil(tmp_path, random.Random(0))
    assert sum(bin(byte).count("1") for byte in (tmp_path / "a").read_bytes()) == 1


def test_only_a_folder_of_its_own_is_emptied(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="holds something else"):
        emptied(tmp_path)
    folder = emptied(tmp_path / "new")
    (folder / "x").touch()
    assert [path.name for path in emptied(folder).iterdir()] == [soak.MARK]


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_short_soak_is_clean(ranks, tmp_path):
    command = [sys.executable, str(ROOT / "tools/soak.py"), "--kills", "6", "--minutes", "8", "--steps", "60"]
    done = subprocess.run([*command, "--ranks", str(ranks), "--out", str(tmp_path / "soak")],
                          capture_output=True, text=True, timeout=TIMEOUT, env=environment(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "soak/soak.json").read_text())
    assert result["kills"] >= 5 and result["resumes"] >= 3 and result["resumes"] == result["resumes_exact"]
