"""Verification: whatever changes in a folder of shards is found, and named."""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.checking.verify import verify
from shards.layout import MissingData
from shards.making.conversion import convert
from shards.making.planning import Options, make_plan
from shards.sources.class_folders import list_class_folders
from tests.folders import contents
from tests.foreign_sets import patched
from tests.images import make_class_folders
from tools.verify_shards import main

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("made")
    make_class_folders(source, classes=2, per_class=3, sides=(16, 24))
    (source / "n00000000" / "bad.JPEG").write_bytes(b"<html>")
    plan = make_plan(list_class_folders(source), Options(samples_per_shard=3))
    convert(plan, folder, num_workers=1, max_bad_fraction=0.2)
    return contents(folder)


@pytest.fixture
def shards(made: dict[str, bytes], tmp_path: Path) -> Path:
    """A fresh copy that a test may damage."""
    for name, data in made.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def names(folder: Path, **options: bool) -> set[str]:
    return {finding.file for finding in verify(folder, **options)}


def test_nothing_is_found_where_nothing_is_wrong(shards):
    progress = []
    assert verify(shards, progress=lambda *counts: progress.append(counts)) == []
    assert progress[-1][0] == progress[-1][1] > 0
    assert verify(shards, quick=True) == []


def test_every_changed_byte_is_found(made, shards):
    """Bytes spread over every file, with steps that meet each kind of field: the finding names the file."""
    rng = random.Random(0)
    for name, data in made.items():
        step = 17 if len(data) < 300 else 191
        for at in range(rng.randrange(step), len(data), step):
            changed = bytearray(data)
            changed[at] ^= rng.randrange(1, 256)
            (shards / name).write_bytes(changed)
            assert name in names(shards), f"{name} at {at}"
        (shards / name).write_bytes(data)
    assert verify(shards) == []


def as_made(made: dict[str, bytes], **changed: bytes) -> set[str]:
    """Names with findings in a folder as it was made, but for the contents `changed`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in {**made, **changed}.items():
            (Path(folder) / name).write_bytes(data)
        return names(Path(folder))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_changed_byte_of_any_file_is_found(made, data):
    name = data.draw(st.sampled_from(sorted(made)))
    at = data.draw(st.integers(0, len(made[name]) - 1))
    changed = bytearray(made[name])
    changed[at] ^= data.draw(st.integers(1, 255))
    assert name in as_made(made, **{name: bytes(changed)})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_cut_or_foreign_content_is_found(made, data):
    name, other = (data.draw(st.sampled_from(sorted(made))) for _ in range(2))
    cut = made[name][: data.draw(st.integers(0, len(made[name]) - 1))]
    assert name in as_made(made, **{name: cut})
    assert name in as_made(made, **{name: made[name] + data.draw(st.binary(min_size=1, max_size=9))})
    assert other == name or name in as_made(made, **{name: made[other]})


def test_a_changed_sample_is_named(made, shards):
    text = made["shard-000001.idx"].decode().splitlines()
    words = text[2].split(" ")
    tar = bytearray(made["shard-000001.tar"])
    tar[int(words[5]) + 100] ^= 1  # inside the image of the second sample
    (shards / "shard-000001.tar").write_bytes(tar)
    (finding,) = verify(shards)
    assert (finding.file, finding.key) == ("shard-000001.tar", words[3].removesuffix(".cls"))
    assert str(finding) == f"shard-000001.tar:{finding.key}: changed: crc32 differs from the index"


@pytest.mark.parametrize("keep", [0, 1, 511, 512, 1024, 5000, -512, -1])
def test_a_cut_file_is_found(made, shards, keep):
    for name in ("shard-000000.tar", "shard-000002.npz", "shard-000001.idx", "manifest.json", "_info.json"):
        (shards / name).write_bytes(made[name][:keep] if keep < len(made[name]) else made[name][:-7])
        assert name in names(shards) and name in names(shards, quick=True), name
        (shards / name).write_bytes(made[name])


@pytest.mark.parametrize("quick", [False, True])
def test_missing_and_extra_files(shards, quick):
    for name in ("shard-000000.tar", "shard-000001.npz", "shard-000002.idx", "quarantine.jsonl"):
        (shards / name).unlink()
    (shards / "shard-000007.tar").write_bytes(b"")
    (shards / "folder").mkdir()
    found = {finding.file: finding.problem for finding in verify(shards, quick=quick)}
    assert found == {
        **dict.fromkeys(("shard-000000.tar", "shard-000001.npz", "shard-000002.idx", "quarantine.jsonl"), "missing"),
        **dict.fromkeys(("shard-000007.tar", "folder"), "extra: not in the manifest"),
    }


def test_a_quick_look_tells_tars_of_one_size_apart(made, shards):
    (shards / "shard-000001.tar").write_bytes(patched(made["shard-000001.tar"], 0, 0, b"x"))
    (finding,) = verify(shards, quick=True)
    assert finding.file == "shard-000001.tar" and finding.problem.startswith("another tar, or another index: no n0")


def test_the_line_that_is_wrong_in_an_index_of_dali(made, shards):
    text = made["shard-000001.idx"].decode().replace(" 512 ", " -512 ", 1)
    (shards / "shard-000001.idx").write_text(text)
    (finding,) = verify(shards, quick=True)
    assert finding.file == "shard-000001.idx" and "; line 2: cls -512 1: offset and size must be" in finding.problem


@pytest.mark.parametrize("suffix", ["tar", "npz", "idx"])
def test_swapped_files_are_named(made, shards, suffix):
    one, two = f"shard-000000.{suffix}", f"shard-000001.{suffix}"
    (shards / one).write_bytes(made[two])
    (shards / two).write_bytes(made[one])
    found = {finding.file: finding.problem for finding in verify(shards) if finding.problem.startswith("swapped")}
    assert found == {one: f"swapped: it is {two}", two: f"swapped: it is {one}"}


def test_wrong_promises_that_agree_with_themselves(made, shards):
    """Hashes that were made for wrong files do not help: the tar's own headers are read."""
    from dataclasses import replace

    from shards.index import format_index, parse_index
    from shards.layout import parse_manifest, sha256_hex

    def forge(change, idx=made["shard-000000.idx"]) -> set[str]:
        index = parse_index(made["shard-000000.npz"], Path("x"))
        arrays = {name: array.copy() for name, array in index.arrays.items()}
        change(arrays)
        data = format_index(replace(index, arrays=arrays, dali_sha256=sha256_hex(idx)))
        manifest = parse_manifest(made["manifest.json"].decode(), Path("x"))
        record = manifest.shards[0]
        digests = {**record.sha256, "npz": sha256_hex(data), "idx": sha256_hex(idx)}
        forged = replace(manifest, shards=(replace(record, sha256=digests), *manifest.shards[1:]))
        (shards / "manifest.json").write_text(forged.text())
        (shards / "shard-000000.npz").write_bytes(data)
        (shards / "shard-000000.idx").write_bytes(idx)
        return {f"{finding.file}:{finding.key}" for finding in verify(shards)}

    key = parse_index(made["shard-000000.npz"], Path("x")).arrays["key"][0].decode()
    assert forge(lambda arrays: None) == set()
    assert forge(lambda a: a["label"].__setitem__(0, 1 - a["label"][0])) == {f"shard-000000.tar:{key}"}
    assert forge(lambda a: a["height"].__setitem__(0, 5)) == {f"shard-000000.tar:{key}"}
    assert forge(lambda a: a["size"].__setitem__(0, a["size"][0] - 1)) == {f"shard-000000.tar:{key}"}
    assert forge(lambda a: a["key"].__setitem__(0, b"other")) == {"shard-000000.tar:"}
    assert forge(lambda a: None, idx=made["shard-000001.idx"]) == {"shard-000000.idx:"}


def test_a_key_in_two_shards_is_named(tmp_path):
    from shards.making import planning

    make_class_folders(tmp_path / "source", classes=1, per_class=4)
    plan = make_plan(list_class_folders(tmp_path / "source"), Options(samples_per_shard=2, shuffle=False))
    same = tuple(item._replace(key=plan.shards[0].items[0].key) for item in plan.shards[1].items[:1])
    parts = (plan.shards[0], planning.ShardPlan(1, (*same, plan.shards[1].items[1]), plan.options))
    forged = planning.Plan(plan.listing, plan.options, parts, plan.listing_sha256, plan.sha256)
    convert(forged, tmp_path / "out", num_workers=1)
    (finding,) = verify(tmp_path / "out")
    assert finding.key == plan.shards[0].items[0].key and "shard-000000.tar" in finding.problem


def test_repair_by_deleting_what_is_named(made, shards, tmp_path_factory):
    source = tmp_path_factory.mktemp("again")
    make_class_folders(source, classes=2, per_class=3, sides=(16, 24))
    (source / "n00000000" / "bad.JPEG").write_bytes(b"<html>")
    for name in ("manifest.json", "shard-000001.tar", "shard-000000.npz", "plan.json", "quarantine.jsonl"):
        (shards / name).write_bytes(made[name][:-1] + b"?")
        (shards / verify(shards)[0].file).unlink()
        plan = make_plan(list_class_folders(source), Options(samples_per_shard=3))
        convert(plan, shards, num_workers=1, max_bad_fraction=0.2)
        assert contents(shards) == made


def test_nothing_to_verify(tmp_path):
    with pytest.raises(MissingData):
        verify(tmp_path / "nowhere")
    with pytest.raises(MissingData):
        verify(tmp_path)


def test_tool_exit_codes(shards, capsys):
    assert main([str(shards)]) == 0 and "6 samples in 3 shards are as promised" in capsys.readouterr().out
    assert main([str(shards / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    tar = bytearray((shards / "shard-000000.tar").read_bytes())
    tar[700] ^= 1  # in no header
    (shards / "shard-000000.tar").write_bytes(tar)
    assert main([str(shards), "--quick"]) == 0
    assert main([str(shards)]) == 1 and "crc32" in capsys.readouterr().out


def test_tool_runs_from_anywhere(shards):
    command = [sys.executable, str(ROOT / "tools" / "verify_shards.py"), str(shards)]
    assert subprocess.run(command, cwd="/", capture_output=True).returncode == 0
