"""What tools/make_shards.py says at the end of a run."""

from __future__ import annotations

from pathlib import Path

from images import make_class_folders

from shards.layout import MANIFEST
from tools.make_shards import main


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
