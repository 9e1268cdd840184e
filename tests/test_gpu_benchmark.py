"""The benchmark of a GPU, rehearsed without one: every row comes, from real trainings; no speed is asked."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import ROOT, environment

from recipes import registry
from recipes.costs.training import training_cost
from tools import benchmark
from tools.benchmarks.gpu import LEAST_BYTES, TARGETS, Bench, method_of, withouts, write_pictures
from tools.benchmarks.side_by_side import Settings
from tools.benchmarks.stopwatch import Stopwatch


class Sleeper:
    def nap(self, seconds: float) -> float:
        time.sleep(seconds)
        return seconds


def test_the_stopwatch_follows_calls_and_changes_nothing(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + seconds))
    watch, sleeper = Stopwatch(torch.device("cpu")), Sleeper()
    watch.follow(sleeper, "nap", "naps")
    assert [sleeper.nap(seconds) for seconds in (9.0, 9.0, 1.0, 3.0)] == [9.0, 9.0, 1.0, 3.0]
    assert watch.medians() == {"naps": 2.0}  # of the later half


def test_pictures_are_distinct_and_large(tmp_path):
    write_pictures(str(tmp_path), first=7, count=20)
    files = list(tmp_path.glob("class_[01]/*.jpg"))
    assert {int(file.stem) for file in files} == set(range(7, 27))
    assert len({file.read_bytes() for file in files}) == 20
    assert sum(file.stat().st_size for file in files) / 20 > LEAST_BYTES


def bare(name: str = "", **settings) -> Bench:
    """Without pictures, on the GPU of that name or on none."""
    bench = Bench.__new__(Bench)
    bench.folder, bench.settings, bench.on_gpu = Path("/nowhere"), Settings(**settings), bool(name)
    bench.runtime = SimpleNamespace(device=torch.device("cuda" if name else "cpu"))
    return bench


@pytest.mark.parametrize(
    ("name", "attainable", "peak"),
    [("", 790, 989), ("NVIDIA H200", 790, 989), ("NVIDIA A100-SXM4-80GB", 250, 312), ("NVIDIA L4", 790, 989)],
)
def test_shares_are_of_the_targets(name, attainable, peak, monkeypatch):
    """Of the GPU that there is; of an H200 where it is another than those that are known."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(Bench, "recipe", lambda self, name, batch: registry.load(name))
    speed, attained, of_peak = bare(name).rate_rows("vit_b_lut", 128, 1000.0)
    flops = training_cost(registry.load("vit_b_lut")).flops
    assert speed.theirs == pytest.approx(TARGETS["vit_b_lut"] / 100 * attainable * 1e12 / flops) and speed.ours == 1000
    assert attained.ours == pytest.approx(100 * 1000 * flops / attainable / 1e12)
    assert attained.theirs == pytest.approx(45) and of_peak.ours == pytest.approx(100 * 1000 * flops / peak / 1e12)
    assert len({round(row.ratio, 9) for row in (speed, attained, of_peak)}) == 1


@pytest.mark.parametrize(("fed", "stall"), [(100.0, 0.01), (120.0, 0.01), (96.0, 4.0)])
def test_a_stall_is_never_less_than_none(fed, stall, monkeypatch):
    monkeypatch.setattr(Bench, "speed", lambda self, *_, from_dali=False, **__: fed if from_dali else 100.0)
    monkeypatch.setattr(Bench, "memory_rows", lambda self, *_: ())
    rows = {row.name: row for row in bare(rehearse=True).rows("vit_ti_mae_demo")}
    row = rows["vit_ti_mae_demo, batch 8: stall, against its limit"]
    assert row.ours == pytest.approx(stall) and row.ratio == pytest.approx(3 / stall)


def test_every_recipe_that_needs_a_teacher_has_one():
    teachers = {"vit_b_mae": "", "vit_b_dtm": "pixels", "vit_b_mae_dtm": "pixels", "vit_b_dtm_pixels": "pixels"}
    assert {name: bare(rehearse=True).recipe(name, 8).teacher for name in teachers} == teachers


def test_an_unknown_recipe_is_told_at_once(monkeypatch, capsys):
    monkeypatch.setattr("tools.benchmarks.gpu.make_shards", None)  # nobody makes pictures
    assert benchmark.main(["gpu", "--rehearse", "--recipes", "vit_ti_lut_demo,vit_xl"]) == 2
    assert "vit_xl: no such recipe" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert benchmark.main(["gpu"]) == 2
    assert "suite=gpu: no GPU to be seen; tools/doctor.py says why, --rehearse" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("name", ["vit_ti_lut_demo", "vit_ti_dtm_demo"])
def test_the_rehearsal(name, tmp_path):
    file = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "tools" / "benchmark.py"), "gpu", "--rehearse", "--recipes", name]
    done = subprocess.run(
        [*command, "--scale", "0.05", "--json", str(file)],
        capture_output=True, text=True, timeout=600, env=environment(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = {row["name"].removeprefix(name).lstrip(",: "): row for row in json.loads(file.read_text())["rows"]}
    assert all(row["ours"] == row["ours"] and row["theirs"] > 0 for row in rows.values())
    for part in ("forward", "backward", "optimizer", "moving average"):
        assert 0 < rows[f"{part}, share of the step"]["ratio"] < 1.5
    of_method = [without.name for without in withouts() if without.method in ("", method_of(name))]
    assert len(of_method) == 5 + (1 if "lut" in name else 2)
    for without in of_method:
        assert rows[f"batch 8: {without}, against none"]["theirs"] > 0
    for what in ("speed, against the target", "peak memory, against the plan", "stall, against its limit"):
        assert f"batch 8: {what}" in rows
