"""Another number of ranks at the resume: the same batches bit for bit, and fp32 losses equal to rounding."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from runs import TIMEOUT, TINY, TRAIN, environment, launch, read_lines, train, train_together

from engine.checkpoints.elastic import universal_form
from engine.checkpoints.manifests import read_manifest
from engine.feeding import make_train_loader
from engine.objectives.build import build_objective
from engine.runtime import Runtime
from engine.start_up import other_images_at_once
from recipes import registry
from recipes.overrides import apply_overrides
from shards.dataset import open_dataset

STEPS, CUT = 20, 7  # of the whole run, and those before the resume
SETTINGS = (*TINY, "optim.global_batch=8", f"run.steps={STEPS}", "precision=fp32",
            "zero.param_persistence_threshold=0", "run.save_every=0")  # fmt: skip
COMMON = ("--recipe", "vit_ti_mae_demo", *SETTINGS)
LUT = "--recipe=vit_ti_lut_demo,objective.head_hidden=32,objective.norm_batch=8"


def losses(run: Path) -> list[float]:
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1)), run.name
    return [line["loss"] for line in lines]


def furthest(run: Path, whole: Path) -> float:
    return max(abs(one - other) for one, other in zip(losses(run), losses(whole), strict=True))


def part(name: str, overrides: str) -> str:
    return f"{name}={overrides},run.stop_after={CUT}"


def resume(name: str, overrides: str) -> str:
    return f"{name}={overrides},--resume"


@pytest.fixture(scope="module")
def folder(shards, tmp_path_factory) -> Path:
    """Wholes on one rank; `up*` saved by one rank and resumed by two, `down*` the other way. Stage 3 comes last."""
    folder = tmp_path_factory.mktemp("elastic")
    (folder / "train").symlink_to(shards / "train")  # without `val` beside it: nothing is evaluated
    common = (*COMMON, f"data.train={folder}/train")
    lut = f"{LUT},optim.micro_batch=8"
    first = ("whole=", f"lut={lut}", part("up_lut", lut), part("up1", "zero.stage=1"), part("up3", "zero.stage=3"))
    train_together(folder, *first, "--", *common)
    shutil.copytree(folder / "up_lut", folder / "other_lut")
    second = (
        resume("up_lut", f"{LUT},optim.micro_batch=4"),
        resume("other_lut", f"{LUT},optim.micro_batch=2"),
        resume("up1", "zero.stage=1"),
        part("down1", "zero.stage=1"),
        resume("up3", "zero.stage=3"),
        part("down3", "zero.stage=3"),
    )
    (folder / "two_ranks.txt").write_text(train_together(folder, *second, "--", *common, ranks=2))
    third = (resume("down1", "zero.stage=1"), resume("down3", "zero.stage=3"))
    (folder / "one_rank.txt").write_text(train_together(folder, *third, "--", *common))
    return folder


@pytest.mark.parametrize("name", ["up1", "up3", "down1", "down3"])
def test_another_number_of_ranks_has_the_same_losses(name, folder):
    """A constant learning rate or weight decay, or steps of Adam counted twice, would be far beyond rounding."""
    assert furthest(folder / name, folder / "whole") <= 1e-5


def test_lut_has_them_where_batch_norm_sees_as_many_images(folder):
    """micro 8 x 1 rank, then 4 x 2; batch norm's statistics are in no optimizer and must have come too."""
    assert furthest(folder / "up_lut", folder / "lut") <= 1e-5
    saved, resumed = (read_parts_of(folder / name) for name in ("lut", "up_lut"))
    running = [name for name in saved if name.endswith("running_mean")]
    assert running and all(torch.allclose(saved[name], resumed[name], atol=1e-5) for name in running)


def read_parts_of(run: Path) -> dict[str, torch.Tensor]:
    from engine.weights.export import find_checkpoint, read_parts

    return read_parts(find_checkpoint(run))[0]


def test_lut_with_another_number_of_images_warns_and_says_why(folder):
    output = (folder / "two_ranks.txt").read_text()
    warning = "batch norm or InfoNCE saw 8 images at once (micro 8 x ranks 1), now 4 (micro 2 x ranks 2)"
    assert output.count(warning) == 1 and "optim.micro_batch=4 would keep them" in output
    assert furthest(folder / "other_lut", folder / "lut") > 1e-4


def test_the_start_lines_say_that_it_is_elastic(folder):
    assert (folder / "one_rank.txt").read_text().count("elastic     saved by 2 ranks, now 1") == 2
    assert (folder / "two_ranks.txt").read_text().count("elastic     saved by 1 rank, now 2") == 4


def test_nothing_of_the_conversion_stays(folder):
    for name in ("up1", "up3", "down1", "down3", "up_lut"):
        left = {path.name for path in (folder / name / "checkpoints").iterdir()}
        assert left == {f"step_{CUT:08d}", f"step_{STEPS:08d}"}, name


def test_an_elastic_checkpoint_is_one_of_the_new_number_of_ranks(folder):
    for name, ranks in (("up1", 2), ("down3", 1)):
        checkpoint = folder / name / "checkpoints" / f"step_{STEPS:08d}"
        assert read_manifest(checkpoint, resumable=True)["world_size"] == ranks
        assert len(list(checkpoint.glob("*optim_states.pt"))) == ranks


@pytest.mark.parametrize("recipe", ["vit_ti_mae_demo", "vit_ti_lut_demo", "vit_ti_dtm_demo"])
def test_batches_augmentations_and_masks_are_bitwise_the_same(recipe, shards):
    """What two ranks are served from step 3 on is what one rank would have been served."""
    made = apply_overrides(registry.load(recipe), ["optim.global_batch=16", "optim.micro_batch=4", "data.threads=1"]
                           + (["teacher=pixels"] if "dtm" in recipe else []))  # fmt: skip
    dataset, objective = open_dataset(shards / "train"), build_objective(made)

    def served(rank: int, ranks: int, first: int) -> list[dict]:
        world = Runtime(rank, ranks, rank, ranks, torch.device("cpu"))
        loader = make_train_loader(dataset, made, objective, world, (first, 6), None)
        try:
            return [vars(loader.next_batch()) for _ in range((6 - first) * 4 // ranks)]
        finally:
            loader.close()

    whole = served(0, 1, 0)[3 * 4 :]
    halves = [served(rank, 2, 3) for rank in range(2)]
    assert_rows_equal(rows(whole), {key: row for half in halves for key, row in rows(half).items()})


def rows(batches: list[dict]) -> dict[tuple[int, ...], list[torch.Tensor]]:
    """Every sample of some micro-batches with all that belongs to it, by its place in the run."""
    found = {}
    for number, batch in enumerate(batches):
        tensors = [tensor for value in batch.values() for tensor in (value if isinstance(value, tuple) else (value,))]
        tensors = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
        for row, position in enumerate(batch["positions"].tolist()):
            found[number * 3 // len(batches), position] = [tensor[row] for tensor in tensors]
    return found


def assert_rows_equal(one: dict, other: dict) -> None:
    assert one.keys() == other.keys() and len(one) == 48
    for key, tensors in one.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, other[key], strict=True)), key


def test_a_conversion_that_fails_is_told_and_leaves_nothing(tmp_path):
    world = Runtime(0, 1, 0, 1, torch.device("cpu"))
    (tmp_path / "step_00000001").mkdir()
    with pytest.raises(OSError, match="could not be converted for 1 ranks"):
        with universal_form(tmp_path / "step_00000001", {"files": {}}, world, None):
            raise AssertionError("there is nothing to convert")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]


def test_batch_norm_warns_only_where_it_must():
    manifest = {"recipe": {"optim.micro_batch": "8"}, "world_size": 1}
    lut = apply_overrides(registry.load("vit_ti_lut_demo"), ["optim.global_batch=16", "optim.micro_batch=4"])
    assert other_images_at_once(manifest, lut, world_size=2) == []
    assert len(other_images_at_once(manifest, lut, world_size=4)) == 1
    assert other_images_at_once(manifest, registry.load("vit_ti_mae_demo"), world_size=2) == []


@pytest.mark.long
def test_every_stage_and_precision_and_back_again(shards, tmp_path):
    """1 -> 2 -> 1 ranks, stages 0 to 3 in fp32, 1 to 3 in bf16, 2 with 16-bit parameters."""
    combinations = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16"), (2, "bf16_params"), (3, "fp32"),
                    (3, "bf16")]  # fmt: skip
    runs = {f"stage{stage}_{kind}": f"zero.stage={stage},precision={kind}" for stage, kind in combinations}
    (tmp_path / "train").symlink_to(shards / "train")
    common = (*COMMON, f"data.train={tmp_path}/train")
    wholes = [f"whole_{name}={overrides}" for name, overrides in runs.items() if not name.startswith("stage3")]
    parts = [f"{name}={overrides},run.stop_after=5" for name, overrides in runs.items()]
    train_together(tmp_path, *wholes, *parts, "--", *common)
    again = [f"{name}={overrides},run.stop_after=12,--resume" for name, overrides in runs.items()]
    train_together(tmp_path, *again, "--", *common, ranks=2)
    train_together(tmp_path, *(resume(name, overrides) for name, overrides in runs.items()), "--", *common)
    for name in runs:
        kind = name.partition("_")[2]
        whole = tmp_path / f"whole_{name}" if not name.startswith("stage3") else tmp_path / f"whole_stage1_{kind}"
        assert furthest(tmp_path / name, whole) <= (1e-5 if kind == "fp32" else 2e-2), name


@pytest.mark.long
def test_killed_in_the_conversion_leaves_nothing_after_the_next_resume(shards, tmp_path):
    run, arguments = tmp_path / "run", (*SETTINGS, f"data.train={shards}/train")
    train(run, *arguments, f"run.stop_after={CUT}")
    command = launch(TRAIN, "--recipe", "vit_ti_mae_demo", *arguments, f"run.out={run}", "--resume",
                     launcher="torchrun", ranks=2)  # fmt: skip
    fault = {"MASKWRIGHT_FAULT": "resume.converted:kill"}
    killed = subprocess.run(command, env=environment(tmp_path) | fault, timeout=TIMEOUT, capture_output=True)
    assert killed.returncode != 0 and list((run / "checkpoints").glob(".tmp-universal-*"))
    train(run, *arguments, "--resume", launcher="torchrun", ranks=2)
    assert len(losses(run)) == STEPS and not list((run / "checkpoints").glob(".tmp-*"))
