"""Repair: what the manifest can prove comes back with the same bytes, the rest is named with the command to run."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shards.checking.repair import again, repair
from shards.checking.verify import verify
from shards.layout import MissingData
from shards.making.conversion import convert
from shards.making.planning import Options, make_plan
from shards.sources.class_folders import list_class_folders
from tests.folders import contents
from tests.images import make_class_folders
from tools.verify_shards import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    make_class_folders(folder, classes=2, per_class=5, sides=(16, 24))
    (folder / "n00000000" / "bad.JPEG").write_bytes(b"<html>")
    return folder


@pytest.fixture(scope="module")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Four shards; one image was left out of `shard-000000` (the order is sorted)."""
    folder = tmp_path_factory.mktemp("made")
    plan = make_plan(list_class_folders(source), Options(samples_per_shard=3, shuffle=False, split="it's"))
    convert(plan, folder, num_workers=1, max_bad_fraction=0.2)
    return contents(folder)


@pytest.fixture
def shards(made: dict[str, bytes], tmp_path: Path) -> Path:
    folder = tmp_path / "my shards"
    folder.mkdir()
    for name, data in made.items():
        (folder / name).write_bytes(data)
    return folder


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_a_sound_folder_is_left_alone(made, shards):
    before = {path.name: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert repair(shards) == [] and contents(shards) == made
    assert {path.name: path.stat().st_mtime_ns for path in shards.iterdir()} == before


def test_all_small_files_come_back(made, shards):
    """Missing, cut, damaged and swapped; the tars are not written again."""
    tars = {path: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    for name in ("shard-000001.idx", "shard-000001.npz", "plan.json", "_info.json", "quarantine.jsonl"):
        (shards / name).unlink()
    (shards / "shard-000000.idx").write_bytes(made["shard-000000.idx"][:-9])
    (shards / "shard-000002.idx").write_bytes(flipped(made["shard-000002.idx"], 40))
    at = made["shard-000000.npz"].index(b"offset.npy") + 150  # in one array: the rest of the file is whole
    (shards / "shard-000000.npz").write_bytes(flipped(made["shard-000000.npz"], at))
    (shards / "shard-000002.npz").write_bytes(made["shard-000003.npz"])
    (shards / "shard-000003.npz").write_bytes(made["shard-000002.npz"])
    assert verify(shards)
    assert sorted(repair(shards)) == [
        *("_info.json", "plan.json", "quarantine.jsonl", "shard-000000.idx", "shard-000000.npz"),
        *("shard-000001.idx", "shard-000001.npz", "shard-000002.idx", "shard-000002.npz", "shard-000003.npz"),
    ]
    assert contents(shards) == made and verify(shards) == []
    assert {path: path.stat().st_mtime_ns for path in shards.glob("*.tar")} == tars


def test_what_cannot_be_proved_is_made_again_by_the_command(made, shards, source, capsys):
    """A lost index of a shard with an image left out, and a damaged tar whose index is damaged too."""
    (shards / "shard-000000.npz").unlink()
    (shards / "shard-000002.tar").write_bytes(damaged := flipped(made["shard-000002.tar"], 700))
    (shards / "shard-000002.npz").unlink()
    (shards / "stranger.txt").write_text("mine")
    assert repair(shards) == []
    assert (shards / "shard-000002.tar").read_bytes() == damaged
    assert main([str(shards), "--repair"]) == 1
    told = capsys.readouterr().out
    command = again(shards, [finding.file for finding in verify(shards)])
    assert command in told and "stranger" not in command and "shard-000002.tar" in command
    assert again(shards, ["stranger.txt"]) == ""
    tool = f"{sys.executable} {ROOT}/tools/make_shards.py {shlex.quote(str(source))}"
    run = command.replace("python tools/make_shards.py SRC", tool) + " --max-bad-fraction 0.2 --workers 1"
    assert subprocess.run(["bash", "-c", run], capture_output=True).returncode == 0
    (shards / "stranger.txt").unlink()
    assert contents(shards) == made


def test_a_damaged_manifest_proves_nothing(made, shards, capsys):
    (shards / "manifest.json").write_bytes(made["manifest.json"][:-9])
    (shards / "shard-000001.idx").unlink()
    assert repair(shards) == []
    assert main([str(shards), "--repair"]) == 1
    assert "make_shards.py SRC" in capsys.readouterr().out
    with pytest.raises(MissingData):
        repair(shards / "nowhere")


def test_the_tool_repairs(made, shards, capsys):
    (shards / "shard-000001.idx").unlink()
    assert main([str(shards)]) == 1 and "--repair" in capsys.readouterr().out
    assert main([str(shards), "--repair"]) == 0 and "rebuilt shard-000001.idx" in capsys.readouterr().out
    assert contents(shards) == made
