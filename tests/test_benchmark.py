"""The benchmark runner measures what it says, turn by turn, and writes it down; no speed is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shards.layout import read_manifest
from tests.foreign_sets import numbered_set
from tests.images import make_class_folders
from tools import benchmark
from tools.benchmarks import data, side_by_side
from tools.benchmarks.side_by_side import Row, Settings, compared, interleaved, smaller

ROOT = Path(__file__).resolve().parents[1]


def test_works_take_turns_and_the_first_round_does_not_count(monkeypatch):
    clock, order = [0.0], []
    monkeypatch.setattr(side_by_side.time, "perf_counter", lambda: clock[0])
    spent = {"ours": iter([100.0, 1.0, 5.0, 2.0]), "theirs": iter([100.0, 4.0, 4.0, 9.0])}

    def work(name: str) -> None:
        order.append(name)
        clock[0] += next(spent[name])

    seconds = interleaved((lambda: work("ours"), lambda: work("theirs")), rounds=3)
    assert seconds == [2.0, 4.0] and order == ["ours", "theirs"] * 4
    assert smaller("x", 2, 8, "bytes") == Row(name="x", ratio=4.0, ours=2, theirs=8, unit="bytes")
    assert compared("x", 8, seconds, "y/s") == Row(name="x", ratio=2.0, ours=4.0, theirs=2.0, unit="y/s")


def test_rates_are_amounts_over_medians(tmp_path, shards, monkeypatch):
    run = []

    def timed(works, rounds: int) -> list[float]:
        run.append((rounds, [work() for work in works]))
        return [2.0, 4.0]

    monkeypatch.setattr(data, "interleaved", timed)
    make_class_folders(tmp_path, classes=2, per_class=4)
    row = data.conversion_rate(tmp_path, rounds=3)
    assert (row.ours, row.theirs, row.ratio, row.unit) == (4.0, 2.0, 2.0, "images/s")
    assert run.pop()[0] == 3
    folder = shards / "train"
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    row = data.hash_rate(folder)
    assert row.ours == pytest.approx(size / 2) and row.unit == "MB/s" and read_manifest(folder).samples == 80


def test_indexing_is_measured_and_writes_nothing_beside_the_tars(tmp_path):
    place = numbered_set(tmp_path / "wds")
    before = sorted(place.rglob("*"))
    row = data.index_rate(place, rounds=1)
    assert row.unit == "samples/s" and row.ratio == pytest.approx(row.ours / row.theirs) and row.theirs > 0
    assert sorted(place.rglob("*")) == before


def test_the_sets_are_what_they_say(tmp_path):
    from shards.foreign.indexing import index_shards

    pictures = data.make_pictures(4)
    assert all(60_000 < len(picture) < 200_000 for picture in pictures)
    tars = data.make_tars(tmp_path / "tars", pictures, tars=2, per_tar=3)
    found = index_shards(tars).index
    assert found.samples == 6 and dict(found.components) == {"cls jpg json": 6} and found.labels == "cls"
    folders = data.make_folders(tmp_path / "images", pictures, classes=2, per_class=3)
    assert len(list(folders.glob("n*/*.JPEG"))) == 6


def test_the_suite_from_the_command_line(tmp_path, capsys):
    """Tiny sets, one round: every row is there, in the file and in the table."""
    file = tmp_path / "rows.json"
    command = ["data", "--json", str(file), "--rounds", "1", "--workers", "1", "--scale", "0.01"]
    assert benchmark.main(command) == 0
    written = json.loads(file.read_text())
    assert list(written) == ["rows"]
    assert [row["name"].split(",")[0] for row in written["rows"]] == ["indexing", "conversion", "verification"]
    shown = capsys.readouterr().out
    for row in written["rows"]:
        assert set(row) == {"name", "ratio", "ours", "theirs", "unit"} and row["ours"] > 0 and row["theirs"] > 0
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"])
        assert row["name"].split(",")[0] in shown and f"{row['ratio']:.2f}" in shown


def test_any_suite_can_be_added(monkeypatch, tmp_path):
    module = type(sys)("a_suite")
    module.suite = lambda settings: iter([compared("x", settings.rounds, [1.0, 2.0], "y/s")])
    monkeypatch.setitem(sys.modules, "a_suite", module)
    monkeypatch.setitem(benchmark.SUITES, "mine", "a_suite")
    assert benchmark.main(["mine", "--json", str(tmp_path / "rows.json"), "--rounds", "6"]) == 0
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row == {"name": "x", "ratio": 2.0, "ours": 6.0, "theirs": 3.0, "unit": "y/s"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dta"], r"suite=dta: not known (did you mean data?); choose one of data"),
        (["xyz"], r"suite=xyz: not known; choose one of data"),
        (["data", "--rounds", "0"], "rounds=0: at least 1 is needed"),
        (["data", "--workers", "-1"], "workers=-1: at least 1 is needed"),
        (["data", "--scale", "0"], "scale=0: a number above 0 and up to 100 is needed"),
        (["data", "--reference", "/no"], "reference=/no: holds no folder dtm"),
        (["data", "--json", "/no/such/folder/x.json"], "json=/no/such/folder/x.json: the name of a file in a folder"),
        (["data", "--json", "/tmp"], "json=/tmp: the name of a file in a folder that exists is needed"),
    ],
)
def test_impossible_commands(arguments, message, capsys):
    assert benchmark.main(arguments) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_suites_are_imported_only_when_asked_for():
    """`--help` answers at once, and names the suites."""
    script = (
        "import sys; sys.argv = ['x', '--help']\nfrom tools.benchmark import main\n"
        "try: main()\nfinally: print(*sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert all(f"  {name}" in result.stdout for name in benchmark.SUITES)
    imported = set(result.stdout.splitlines()[-1].split())
    assert "tools.benchmark" in imported
    assert not {"numpy", "torch", "nvidia.dali", *(f"tools.benchmarks.{name}" for name in benchmark.SUITES)} & imported


def test_settings_scale_sets():
    assert Settings(scale=0.1).scaled(100) == 10 and Settings(scale=0.001).scaled(100, 2) == 2
