"""LUT through the real launcher: ranks, ZeRO stages, resume, and the moving average in the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import TINY, read_lines, train, train_together
from safetensors.torch import load_file

from engine.ema import cosine_momentum

LUT = (*TINY, "objective.head_hidden=32", "objective.norm_batch=8", "run.steps=4")
OUTSIDE = "outside.safetensors"
COMMON = ("--recipe", "vit_ti_lut_demo", *LUT, "zero.param_persistence_threshold=0", "evaluation.batch=8")
STAGES = {f"stage{stage}": f"zero.stage={stage},precision=fp32" for stage in range(4)}


def start_workers(folder: Path, runs: list[str], *arguments: str) -> None:
    """All runs one after the other in the same two ranks."""
    train_together(folder, *runs, "--", *COMMON, *arguments, ranks=2)


@pytest.fixture(scope="module")
def two_ranks(shards, tmp_path_factory) -> Path:
    """Four steps on two ranks at every ZeRO stage."""
    folder = tmp_path_factory.mktemp("lut")
    start_workers(folder, [f"{name}={run}" for name, run in STAGES.items()], f"data.train={shards}/train")
    return folder


def lines(run: Path) -> list[dict]:
    return read_lines(run / "metrics.jsonl")


def newest(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("step_*"))[-1]


def test_every_stage_has_the_same_losses_and_the_same_average(two_ranks):
    reference = lines(two_ranks / "stage1")
    assert {"loss", "mae", "bc"} <= reference[0].keys()
    average = load_file(newest(two_ranks / "stage1") / OUTSIDE)
    for name in STAGES:
        for line, expected in zip(lines(two_ranks / name), reference, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5), name
        for key, value in load_file(newest(two_ranks / name) / OUTSIDE).items():
            torch.testing.assert_close(value, average[key], rtol=0, atol=1e-5, msg=f"{name} {key}")


def test_the_average_moves_as_written(shards, tmp_path):
    """Recomputed from the saved students: each step moves it by 1 - momentum towards the student after the step."""
    run = train(
        tmp_path / "run", f"data.train={shards}/train", *LUT, "optim.micro_batch=8", "run.save_every=1", "run.keep=9",
        recipe="vit_ti_lut_demo",
    )  # fmt: skip
    saved = sorted((run.folder / "checkpoints").glob("step_*"))
    students, averages = (
        [load_file(checkpoint / name) for checkpoint in saved] for name in ("encoder/model.safetensors", OUTSIDE)
    )
    key = "blocks.0.attn.qkv.weight"
    expected = students[0][key]  # the first step has learning rate 0: still the initial weights
    assert torch.equal(averages[0][f"average.encoder.{key}"], expected)
    for step in range(1, 4):
        momentum = cosine_momentum(0.99, step / 4)
        expected = expected.lerp(students[step][key], 1 - momentum)
        torch.testing.assert_close(averages[step][f"average.encoder.{key}"], expected, rtol=0, atol=1e-7)
        assert not torch.equal(averages[step][f"average.encoder.{key}"], averages[0][f"average.encoder.{key}"])


@pytest.mark.long  # tests/test_elastic.py has a short form
def test_one_rank_with_the_same_images_under_batch_norm_is_equal(two_ranks, shards, tmp_path):
    """micro_batch x ranks kept (8 x 1 and 4 x 2): losses agree; halved, batch norm sees others and they do not."""
    arguments = (f"data.train={shards}/train", *LUT, "precision=fp32")
    same = train(tmp_path / "same", *arguments, "optim.micro_batch=8", recipe="vit_ti_lut_demo")
    for one, two in zip(same.metrics, lines(two_ranks / "stage1"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    assert "batch norm  over micro 8 x ranks 1 = 8 images" in same.output and "WARNING" not in same.output
    other = train(tmp_path / "other", *arguments, "optim.micro_batch=4", recipe="vit_ti_lut_demo")
    assert "WARNING, the recipe means 8" in other.output
    assert other.metrics[0]["bc"] != pytest.approx(same.metrics[0]["bc"], abs=1e-4)


@pytest.mark.long  # tests/test_exact_resume.py and test_bad_steps.py have short forms of it
def test_resumed_is_bitwise_the_same(two_ranks, shards, tmp_path):
    """Two steps, then the rest, at stages 1 and 3: losses, and the average in the last checkpoint."""
    chosen = {name: STAGES[name] for name in ("stage1", "stage3")}
    data = f"data.train={shards}/train"
    start_workers(tmp_path, [f"{name}={run},run.stop_after=2" for name, run in chosen.items()], data)
    start_workers(tmp_path, [f"{name}={run}" for name, run in chosen.items()], data, "--resume")
    for name in chosen:
        resumed, whole = (
            {line["step"]: line["loss_hex"] for line in lines(folder / name)} for folder in (tmp_path, two_ranks)
        )
        assert resumed == whole and len(whole) == 4
        average = load_file(newest(two_ranks / name) / OUTSIDE)
        for key, value in load_file(newest(tmp_path / name) / OUTSIDE).items():
            assert torch.equal(value, average[key]), f"{name} {key}"
