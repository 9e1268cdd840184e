"""Folders for the index files of a segment: gone at the end, and those of dead processes gone with the next one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shards.reading.segments import index_folder, sweep

OWNER = """
import sys
import shards.reading.segments as segments
segments._SCRATCH_SPARE = 0
segments.SCRATCH = segments.Path(sys.argv[1])
with segments.index_folder() as folder:
    (folder / "0").write_text("v1.1 1")
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("shards.reading.segments.SCRATCH", tmp_path)
    monkeypatch.setattr("shards.reading.segments._SCRATCH_SPARE", 0)
    return tmp_path


@pytest.fixture
def owner(scratch: Path):
    """Another process that holds a folder until its input ends, and that folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(scratch)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parents[1],
    )  # fmt: skip
    yield process, Path(process.stdout.readline().strip())
    process.kill()
    process.communicate()


def test_a_folder_names_its_owner_and_goes_at_the_end(scratch):
    with pytest.raises(KeyError), index_folder() as folder:
        assert folder.parent == scratch and f"-{os.getpid()}-" in folder.name
        (folder / "0").write_text("v1.1 1")
        raise KeyError
    assert not list(scratch.iterdir())


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_the_folder_of_a_killed_process_goes_with_the_next(scratch, owner, ending):
    process, left = owner
    with index_folder() as mine:
        assert (left / "0").exists(), "its owner lives"
        process.send_signal(ending)
        process.wait()
        assert left.exists()
        with index_folder():
            assert not left.exists() and mine.exists()


def test_folders_of_others_are_left_alone(scratch, monkeypatch):
    for name in ("maskwright-indexes-1-abc", "maskwright-index-abc", "other"):
        (scratch / name).mkdir()
    target = scratch / "other" / "kept"
    target.mkdir()
    (scratch / "maskwright-indexes-1-link").symlink_to(target)
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    sweep(scratch)
    assert (scratch / "maskwright-indexes-1-abc").exists()
    monkeypatch.setattr(os, "getuid", lambda: user)
    sweep(scratch)
    assert not (scratch / "maskwright-indexes-1-abc").exists()
    assert target.exists() and (scratch / "maskwright-index-abc").exists()
