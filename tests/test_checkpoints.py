"""A checkpoint is complete or absent: what its manifest may say, what is damage, what cannot be written, what goes."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from engine.agreement import RankFailure, together
from engine.checkpoints import keeping, loading, space
from engine.checkpoints.choosing import choose
from engine.checkpoints.comparing import check_same_run, other_circumstances
from engine.checkpoints.finite import first_not_finite
from engine.checkpoints.folders import FORMAT, CheckpointError, complete_checkpoints
from engine.checkpoints.hashing import hash_file, hash_files
from engine.checkpoints.keeping import Keeper, SaveError
from engine.checkpoints.manifests import read_manifest, total_bytes, write_manifest
from engine.checkpoints.progress import watched
from engine.checkpoints.saving import Saved
from engine.checkpoints.verifying import damage, newest_intact
from engine.checkpoints.writing import NotFinite, RememberingWriter, write_state
from engine.runtime import Runtime
from engine.shell import OnThisRank
from engine.start_up import is_harmless, is_structural, may_differ
from recipes.schema import Run

WORLD = Runtime(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
FACTS = {"name": "vit_ti_mae_demo", "recipe": {}, "dataset": "d" * 64, "objective": {}, "world_size": 1}
MODEL, WEIGHTS = "mp_rank_00_model_states.pt", "encoder/model.safetensors"


def make_checkpoint(root: Path, step: int) -> Path:
    """A complete checkpoint of two small files."""
    folder = root / f"step_{step:08d}"
    (folder / "encoder").mkdir(parents=True)
    values = torch.full((1000,), float(step))
    torch.save({"module": {"weight": values}}, folder / MODEL)
    save_file({"weight": values}, folder / WEIGHTS)
    seal(folder, step)
    return folder


def seal(folder: Path, step: int) -> None:
    write_manifest(folder, {"format": FORMAT, "step": step, **FACTS, "files": hash_files(folder, WORLD)})


def damage_of(folder: Path) -> str | None:
    return damage(folder, read_manifest(folder, resumable=True), WORLD)


# --- manifests ------------------------------------------------------------------------------------------------------

GOOD = {"format": FORMAT, "step": 3, **FACTS, "files": {"a/b.pt": {"bytes": 1, "sha256": "0" * 64}}}


def with_file(name: str, record: object) -> str:
    return json.dumps(GOOD | {"files": {name: record}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unreadable"),
        (json.dumps(GOOD)[:-20], "unreadable"),
        ('{"format": "x", "format": "y"}', "a key stands twice"),
        ("[" * 100_000, "unreadable"),
        ("[]", "its format is list"),
        (json.dumps(GOOD | {"format": "maskwright-checkpoint/9"}), "its format is maskwright-checkpoint/9"),
        (json.dumps(GOOD | {"step": -1}), "step is -1; a whole number from 0"),
        (json.dumps(GOOD | {"step": 3.0}), "step is 3.0, not of type int"),
        (json.dumps(GOOD | {"step": True}), "step is True"),
        (json.dumps(GOOD | {"world_size": 0}), "world_size is 0; a whole number from 1"),
        (json.dumps(GOOD | {"step": float("nan")}), "NaN is no number"),
        (json.dumps({key: value for key, value in GOOD.items() if key != "files"}), "files is None"),
        (json.dumps({key: value for key, value in GOOD.items() if key != "dataset"}), "dataset is None"),
        (with_file("../../x.pt", {"bytes": 1, "sha256": "0" * 64}), "is no name of a file in the folder"),
        (with_file("/etc/passwd", {"bytes": 1, "sha256": "0" * 64}), "is no name of a file in the folder"),
        (with_file("a//b", {"bytes": 1, "sha256": "0" * 64}), "is no name of a file in the folder"),
        (with_file("a.pt", {"bytes": -5, "sha256": "0" * 64}), "-5 bytes"),
        (with_file("a.pt", {"bytes": 5, "sha256": "zz"}), "sha256 'zz'"),
        (with_file("a.pt", {"bytes": 5}), "bytes and sha256 are needed"),
        (with_file("a.pt", 5), "bytes and sha256 are needed"),
    ],
)
def test_a_manifest_is_read_strictly(text, message, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        read_manifest(tmp_path, resumable=True)


def test_a_manifest_of_bytes_or_none_is_refused_too(tmp_path):
    with pytest.raises(CheckpointError, match="unreadable"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="unreadable"):
        read_manifest(tmp_path)


def test_any_cut_or_changed_manifest_is_refused_or_reads_the_same_files(tmp_path):
    """Hundreds of mutations: an exception of ours, or a manifest whose every name stays inside the folder."""
    text, luck = json.dumps(GOOD, indent=1).encode(), random.Random(0)
    for _ in range(500):
        spoilt = bytearray(text[: luck.randrange(1, len(text))] if luck.random() < 0.3 else text)
        spoilt[luck.randrange(len(spoilt))] = luck.randrange(256)
        (tmp_path / "manifest.json").write_bytes(spoilt)
        try:
            manifest = read_manifest(tmp_path, resumable=True)
        except CheckpointError:
            continue
        assert all(".." not in name.split("/") and not name.startswith("/") for name in manifest["files"])
        assert total_bytes(manifest) >= 0


# --- damage ---------------------------------------------------------------------------------------------------------


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [MODEL, WEIGHTS])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: cut(path, 0.5), "bytes, the manifest has"),
        (lambda path: cut(path, 0.99), "bytes, the manifest has"),
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), "0 bytes, the manifest has"),
        (flip, "do not have the manifest's hash"),
    ],
)
def test_what_is_not_as_it_was_written_is_found(name, spoil, message, tmp_path):
    folder = make_checkpoint(tmp_path, 5)
    assert damage_of(folder) is None
    spoil(folder / name)
    assert damage_of(folder).startswith(f"{name}: ") and message in damage_of(folder)


class Payload:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_was_put_in_is_not_opened(tmp_path):
    folder = make_checkpoint(tmp_path, 5)
    torch.save({"module": Payload(tmp_path / "made")}, folder / MODEL)
    assert damage_of(folder).startswith(f"{MODEL}: ") and not (tmp_path / "made").exists()
    torch.load(folder / MODEL, weights_only=False)
    assert (tmp_path / "made").exists(), "the pickle of this test does nothing"


def test_a_file_of_another_step_is_found(tmp_path):
    folder, other = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 4)
    shutil.copy(other / MODEL, folder / MODEL)
    assert damage_of(folder).startswith(f"{MODEL}: ") and "do not have the manifest's hash" in damage_of(folder)


@pytest.mark.parametrize("name", [MODEL, WEIGHTS])
def test_numbers_that_are_none_are_damage_though_the_hash_is_right(name, tmp_path):
    folder = make_checkpoint(tmp_path, 5)
    values = torch.ones(10)
    values[3] = torch.inf
    save_file({"weight": values}, folder / name) if name == WEIGHTS else torch.save({"m": [values]}, folder / name)
    seal(folder, 5)
    assert damage_of(folder) == f"{name}: {'weight' if name == WEIGHTS else 'm.0'} is not finite"


def test_a_broken_newest_one_is_named_and_the_one_before_is_used(tmp_path):
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path, step)
    flip(tmp_path / "step_00000004" / MODEL)
    (tmp_path / "step_00000003" / "manifest.json").write_text("{}")
    told: list[str] = []
    folder, manifest = newest_intact(tmp_path, WORLD, told.append)
    assert folder.name == "step_00000002" and manifest["step"] == 2
    assert "step_00000004: mp_rank_00_model_states.pt" in told[0] and "step_00000003: manifest.json" in told[1]
    assert len(list(tmp_path.glob("broken-step_*"))) == 2 and len(complete_checkpoints(tmp_path)) == 2
    flip(tmp_path / "step_00000001" / WEIGHTS)
    flip(tmp_path / "step_00000002" / WEIGHTS)
    with pytest.raises(CheckpointError, match="4 checkpoints, all broken .*new run.out"):
        newest_intact(tmp_path, WORLD, told.append)
    with pytest.raises(CheckpointError, match="4 checkpoints, all broken"):  # and again, when no more is found
        newest_intact(tmp_path, WORLD, told.append)


@pytest.mark.parametrize(
    ("resume", "message"),
    [("must", "2 checkpoints, all broken"), ("auto", "2 checkpoints, all broken"), (None, "holds 2 broken checkpoint")],
)
def test_where_all_are_broken_nothing_begins_at_step_0(resume, message, tmp_path):
    for step in (1, 2):
        flip(make_checkpoint(tmp_path, step) / MODEL)
    with pytest.raises(CheckpointError, match="all broken"):
        newest_intact(tmp_path, WORLD, print)
    command = SimpleNamespace(resume=resume, allow_changes=False, recipe=None)
    with pytest.raises(ValueError, match=message):
        choose(command, SimpleNamespace(last_step=9), tmp_path, FACTS, WORLD)
    assert choose(command, None, tmp_path / "new", FACTS, WORLD) is None if resume != "must" else True


def test_a_folder_without_its_manifest_is_no_reason_to_begin_at_step_0(tmp_path):
    """A copy that was not finished: it is named and kept, and what is before it is used."""
    (make_checkpoint(tmp_path, 2) / "manifest.json").unlink()
    for resume, message in (("auto", "1 checkpoints, all broken"), (None, "holds 1 broken checkpoint")):
        again = shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-{resume}")
        command = SimpleNamespace(resume=resume, allow_changes=False, recipe=None)
        with pytest.raises(ValueError, match=message):
            choose(command, SimpleNamespace(last_step=9), again, FACTS, WORLD)
    make_checkpoint(tmp_path, 1)
    told: list[str] = []
    assert newest_intact(tmp_path, WORLD, told.append)[0].name == "step_00000001"
    assert len(told) == 1 and "step_00000002: unreadable manifest.json" in told[0]
    assert len(list(tmp_path.glob("broken-step_00000002-*"))) == 1


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path, monkeypatch):
    """pathlib's glob takes "permission denied" for "nothing there", and `--resume auto` would begin at step 0."""

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    make_checkpoint(tmp_path, 1)
    command = SimpleNamespace(resume="auto", allow_changes=False, recipe=None)
    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(RankFailure, match="Permission denied"):
        choose(command, SimpleNamespace(last_step=9), tmp_path, FACTS, WORLD)


def test_a_users_copy_is_neither_used_nor_counted_nor_deleted(tmp_path):
    for step in (1, 2):
        make_checkpoint(tmp_path, step)
    shutil.copytree(tmp_path / "step_00000001", tmp_path / "step_00000001.bak")
    shutil.copytree(tmp_path / "step_00000002", tmp_path / "step_00000002 (copy)")
    assert newest_intact(tmp_path, WORLD, pytest.fail)[0].name == "step_00000002"
    Keeper(tmp_path, Run(keep=1), WORLD).prune()
    assert names(tmp_path) == ["step_00000001.bak", "step_00000002", "step_00000002 (copy)"]


def test_a_rank_that_cannot_read_its_part_says_so(tmp_path, monkeypatch):
    """The others cannot know why it left; only what all ranks agreed on is told by the first."""

    def refuse(folder, model_engine):
        raise OSError(errno.EIO, "Input/output error", "zero_pp_rank_1.pt")

    monkeypatch.setattr(loading, "load_folder", refuse)
    chosen, second = SimpleNamespace(folder=tmp_path / "step_00000001"), replace(WORLD, rank=1, world_size=2)
    with pytest.raises(OnThisRank, match=r"^rank 1: .*step_00000001 cannot be loaded .*zero_pp_rank_1.pt"):
        loading.load(chosen, None, None, second, universal=False)


# --- writing --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_written_is_remembered_with_its_reason(tmp_path):
    state = {"weight": torch.ones(100_000)}
    writer = RememberingWriter(original=None)
    writer.save(state, "/dev/full")
    writer.save(state, str(tmp_path / "second.pt"))
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        writer.answer()
    assert not (tmp_path / "second.pt").exists(), "after a failure nothing more is written"
    writer = RememberingWriter(original=None)
    writer.makedirs("/dev/full/x")
    with pytest.raises(OSError, match="Not a directory"):
        writer.answer()


def test_numbers_that_are_none_are_not_written(tmp_path):
    state = {"optimizer": {"state": {0: {"exp_avg": torch.tensor([1.0, torch.nan])}}}, "step": torch.tensor(3)}
    with pytest.raises(NotFinite, match=r"a.pt: optimizer.state.0.exp_avg is not finite"):
        write_state(state, str(tmp_path / "a.pt"))
    assert not (tmp_path / "a.pt").exists() and first_not_finite({"a": [torch.zeros(2), 1.0], "b": None}) is None


def test_a_written_file_is_what_torch_would_write(tmp_path):
    state = {"weight": torch.randn(1000), "name": "x", "half": torch.ones(3, dtype=torch.bfloat16)}
    write_state(state, str(tmp_path / "a.pt"))
    again = torch.load(tmp_path / "a.pt", weights_only=True)
    assert all(torch.equal(again[name], state[name]) for name in ("weight", "half")) and again["name"] == "x"
    assert hash_file(tmp_path / "a.pt") == hash_file(tmp_path / "a.pt", from_disk=True)


def test_failing_together_names_the_reason():
    assert together(lambda: 7, WORLD) == [7]
    with pytest.raises(RankFailure, match=r"^\[Errno 28\] full$"):
        together(lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")), WORLD)


def test_long_work_is_seen_to_advance(tmp_path):
    told: list[str] = []
    with watched(lambda: 1_200_000_000, 4.8e9, "step 7: saving", told.append, every=0.01):
        deadline = time.monotonic() + 10
        while not told and time.monotonic() < deadline:
            time.sleep(0.01)
    assert told[0] == "step 7: saving: 1.20 GB of about 4.80 GB"


def test_room_is_asked_for_before_the_first_byte(tmp_path, monkeypatch):
    state = {"weight": torch.zeros(1_000_000)}
    assert space.expected_bytes(tmp_path, state) == 5 * 4_000_000
    folder = make_checkpoint(tmp_path, 1)
    assert space.expected_bytes(tmp_path, state) == sum((folder / name).stat().st_size for name in (MODEL, WEIGHTS))
    space.require_space(tmp_path, 20_000_000)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda root: SimpleNamespace(free=23_000_000))
    with pytest.raises(OSError, match=r"needs 24.00 MB \(1.2 x 20.00 MB\) and 23.00 MB are free"):
        space.require_space(tmp_path, 20_000_000)
    space.require_space(tmp_path, 19_000_000)


# --- what goes and what stays ---------------------------------------------------------------------------------------


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_the_old_go_only_after_the_newer_were_read_again(tmp_path):
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)
    (tmp_path / ".tmp-step_00000004-aa").mkdir()
    flip(tmp_path / "step_00000003" / MODEL)
    keeper = Keeper(tmp_path, Run(keep=1), WORLD)
    keeper.prune()
    assert [name for name in names(tmp_path) if name.startswith("step")] == ["step_00000001", "step_00000002"]
    assert any(name.startswith("broken-step_00000003") for name in names(tmp_path))
    keeper.prune()
    assert [name for name in names(tmp_path) if not name.startswith("broken")] == ["step_00000002"]


def test_what_was_proven_once_is_not_read_again(tmp_path):
    keeper = Keeper(tmp_path, Run(keep=1), WORLD)
    make_checkpoint(tmp_path, 1)
    newer = make_checkpoint(tmp_path, 2)
    keeper.prove(newer, read_manifest(newer))
    flip(newer / MODEL)  # as if a disk had lost it later: nobody looks
    keeper.prune()
    assert names(tmp_path) == ["step_00000002"]
    flip(make_checkpoint(tmp_path, 3) / WEIGHTS)
    with pytest.raises(RankFailure, match="cannot be read again: encoder"):
        keeper.prove(tmp_path / "step_00000003", read_manifest(tmp_path / "step_00000003"))
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step_00000002"]


def test_old_ones_that_cannot_be_deleted_do_not_end_the_run(tmp_path, monkeypatch, capsys):
    keeper = Keeper(tmp_path, Run(keep=1), WORLD)
    make_checkpoint(tmp_path, 1)

    def write(root, *arguments, **settings) -> Saved:
        folder = make_checkpoint(root, 2)
        return Saved(folder, read_manifest(folder))

    def refuse(folder, prefix):
        raise OSError(errno.EROFS, "Read-only file system", str(folder))

    monkeypatch.setattr(keeping, "save", write)
    monkeypatch.setattr(keeping, "set_aside", refuse)
    saved = keeper.save(None, step=2, last=False, state={}, facts={}, write_more=None, say=print)
    assert saved.folder.name == "step_00000002" and "Read-only file system" in capsys.readouterr().out
    assert names(tmp_path) == ["step_00000001", "step_00000002"]


def test_less_to_keep_makes_room_before_the_next_save(tmp_path, monkeypatch):
    """Where the disk is full, run.keep is lowered: that must help although nothing can be saved yet."""
    for step in (1, 2, 3):
        make_checkpoint(tmp_path, step)

    def only_with_room(root, *arguments, **settings) -> Saved:
        if len(complete_checkpoints(root)) > 1:
            raise RankFailure("no room")
        folder = make_checkpoint(root, 4)
        return Saved(folder, read_manifest(folder))

    monkeypatch.setattr(keeping, "save", only_with_room)
    settings = dict(step=4, last=False, state={}, facts={}, write_more=None, say=print)
    assert Keeper(tmp_path, Run(keep=3), WORLD).save(None, **settings) is None
    assert Keeper(tmp_path, Run(keep=1), WORLD).save(None, **settings).folder.name == "step_00000004"
    assert names(tmp_path) == ["step_00000004"]


@pytest.mark.parametrize(("policy", "last", "allowed"), [("go_on", False, 2), ("go_on", True, 0), ("stop", False, 0)])
def test_failed_saves_end_the_run_by_policy(policy, last, allowed, tmp_path, monkeypatch, capsys):
    """The real arrangement is tried by the ranks below; here the three rules alone."""

    def fail(*arguments, **settings):
        raise RankFailure("no room")

    monkeypatch.setattr(keeping, "save", fail)
    make_checkpoint(tmp_path, 1)
    keeper = Keeper(tmp_path, Run(on_failed_save=policy), WORLD)
    settings = dict(step=2, last=last, state={}, facts={}, write_more=None, say=print)
    for _ in range(allowed):
        assert keeper.save(None, **settings) is None
        assert "step 2 could not be saved (no room); the newest checkpoint is step_00000001" in capsys.readouterr().out
    with pytest.raises(SaveError, match="no room"):
        keeper.save(None, **settings)


def test_the_section_run_changes_nothing_but_length_and_seed():
    assert is_harmless("run.on_failed_save") and is_harmless("run.keep") and is_harmless("run.timeout")
    assert not any(map(is_harmless, ("run.steps", "run.epochs", "run.seed", "optim.micro_batch", "optim.lr")))
    assert may_differ("optim.micro_batch") and not may_differ("optim.global_batch")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset": "e" * 64}, "data set: dddddddddddd -> eeeeeeeeeeee"),
        ({"recipe": {"run.seed": "1"}}, "run.seed: 0 -> 1"),
        ({"recipe": {"zero.stage": "3"}}, "holds other tensors .zero.stage: 1 -> 3"),
        ({"recipe": {"precision": "fp32"}}, "holds other tensors .precision: bf16 -> fp32"),
        ({"recipe": {"optim.global_batch": "8"}}, "optim.global_batch: 16 -> 8"),
    ],
)
def test_another_run_is_refused_with_a_diff(changed, message):
    recipe = {"run.seed": "0", "zero.stage": "1", "precision": "bf16", "optim.global_batch": "16", "run.keep": "2"}
    now = FACTS | changed | {"recipe": recipe | changed.get("recipe", {})}
    rules = dict(harmless=may_differ, structural=is_structural)
    with pytest.raises(CheckpointError, match=message):
        check_same_run({"step": 7, **FACTS, "recipe": recipe}, now, **rules, allow_changes=False)
    if "holds other tensors" in message:
        with pytest.raises(CheckpointError, match=message):
            check_same_run({"step": 7, **FACTS, "recipe": recipe}, now, **rules, allow_changes=True)


def test_other_circumstances_are_told():
    was = {**FACTS, "world_size": 2, "versions": {"torch": "2.12"}, "hardware": "cpu, x86_64"}
    now = {**FACTS, "versions": {"torch": "2.13"}, "hardware": "NVIDIA H200, x86_64"}
    elastic, warning = other_circumstances(was, now)
    assert elastic.startswith("elastic     saved by 2 ranks, now 1")
    assert "torch 2.12 -> 2.13, cpu, x86_64 -> NVIDIA H200, x86_64: losses will not be bitwise" in warning
    assert other_circumstances(now, now) == []
