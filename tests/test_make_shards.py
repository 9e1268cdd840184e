"""What tools/make_shards.py says before a run and at its end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from images import make_class_folders

from shards.layout import MANIFEST
from shards.making.estimate import estimate
from shards.making.planning import Options, make_plan
from shards.making.writer import make_shard
from shards.sources.class_folders import list_class_folders
from tools.make_shards import duration, main


def test_the_end_is_told_as_it_was(tmp_path: Path, capsys):
    """Refused for bad images, then allowed: every shard is there already, and the manifest is written by this run."""
    make_class_folders(tmp_path / "images", classes=2, per_class=4, seed=0)
    bad = next((tmp_path / "images").glob("*/*"))
    bad.write_bytes(b"no image")
    command = [str(tmp_path / "images"), str(tmp_path / "out"), "--workers", "1", "--samples-per-shard", "8"]
    assert main(command) == 1 and not (tmp_path / "out" / MANIFEST).exists()
    capsys.readouterr()
    assert main([*command, "--max-bad-fraction", "0.5"]) == 0
    told = capsys.readouterr().out
    assert (tmp_path / "out" / MANIFEST).exists() and "nothing was written" not in told
    assert f"{tmp_path}/out: complete" in told and "1 (0 made now)" in told
    assert main(command) == 0 and "complete, all shards were there before" in capsys.readouterr().out


def test_a_dry_run_tells_shards_bytes_and_time(tmp_path: Path, capsys):
    make_class_folders(tmp_path / "images", classes=2, per_class=50, seed=0)
    next((tmp_path / "images").glob("*/*")).write_bytes(b"")
    out = tmp_path / "out"
    command = [str(tmp_path / "images"), str(out), "--samples-per-shard", "8", "--workers", "1"]
    assert main([*command, "--dry-run"]) == 0 and not out.exists()
    told = capsys.readouterr().out
    rows = {line.split("  ")[0].strip(): line for line in told.splitlines()}
    assert "13 of 8 samples" in rows["shards"] and "seconds with 1 workers" in rows["time"]
    assert "64 images converted on one core" in rows["estimated from"]
    guess = int(rows["bytes of shards"].split("about ")[1].replace(",", ""))
    assert main([*command, "--max-bad-fraction", "0.1"]) == 0
    made = sum(path.stat().st_size for path in out.glob("*.tar"))
    assert abs(guess - made) < 0.15 * made


def test_the_estimate_is_scaled_from_the_sample(tmp_path: Path, monkeypatch):
    """Time of the sample times the share that it is of the whole, over the workers; the sample is spread."""
    make_class_folders(tmp_path, classes=2, per_class=100, seed=0)
    plan = make_plan(list_class_folders(tmp_path), Options(shuffle=False))
    clock = iter([100.0, 103.2])
    monkeypatch.setattr("shards.making.estimate.time", SimpleNamespace(monotonic=lambda: next(clock)))
    parts = []
    monkeypatch.setattr("shards.making.estimate.make_shard", lambda *args: parts.append(args[2]) or make_shard(*args))
    guess = estimate(plan, 2)
    assert guess.sampled == 64 and guess.seconds == pytest.approx(3.2 / 64 * 200 / 2)
    assert {item.label for item in parts[0].items} == {0, 1} and len(set(parts[0].items)) == 64


def test_times_are_told_in_their_unit():
    assert [duration(seconds) for seconds in (0.04, 59, 90, 9000)] == [
        *("0.0 seconds", "59.0 seconds", "1.5 minutes", "2.5 hours")
    ]
