"""LUT's settings through the real launcher: two ranks against one, ZeRO stage 3, and a run that stops and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import TINY, read_lines, train_together
from safetensors.torch import load_file

pytestmark = pytest.mark.long  # every method has a shorter run of the same kind in `make test`

COMMON = (
    "--recipe", "vit_ti_lut_demo", *TINY, "objective.head_hidden=32", "objective.norm_batch=8", "run.steps=4",
    "precision=fp32", "evaluation.batch=8", "zero.param_persistence_threshold=0",
)  # fmt: skip
RUNS = {
    "infonce": "objective.bc_loss=infonce,objective.teacher_bn=batch,objective.teacher_mask_ratio=0.5",
    "masked": "objective.bc_tokens=masked,objective.teacher_bn=batch,zero.stage=3",
    "tokenwise": "objective.bc_tokens=pooled_tokenwise,data.shared_crop=true,objective.symmetric=false",
    "bare": "objective.head_depth=0,objective.head_norm=ln,data.crop=rrc",
}


def start_workers(folder: Path, ranks: int, runs: dict[str, str], *arguments: str) -> None:
    """All runs one after the other in the same ranks, with 8 images under batch norm."""
    names = [f"{name}={overrides}" for name, overrides in runs.items()]
    common = (*COMMON, f"optim.micro_batch={8 // ranks}", *arguments)
    train_together(folder, *names, "--", *common, ranks=ranks)


def lines(run: Path) -> list[dict]:
    return read_lines(run / "metrics.jsonl")


def outside(run: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((run / "checkpoints").glob("step_*"))[-1] / "outside.safetensors")


@pytest.fixture(scope="module")
def two_ranks(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    start_workers(folder, 2, RUNS, f"data.train={shards}/train")
    return folder


def test_one_rank_and_two_agree(two_ranks: Path, shards: Path, tmp_path: Path) -> None:
    start_workers(tmp_path, 1, RUNS, f"data.train={shards}/train")
    seen = set()
    for name in RUNS:
        one, two = lines(tmp_path / name), lines(two_ranks / name)
        assert len(one) == 4
        for line, expected in zip(one, two, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5), name
        seen.add(round(one[0]["bc"], 4))
        average = outside(two_ranks / name)
        for key, value in outside(tmp_path / name).items():
            torch.testing.assert_close(value, average[key], rtol=0, atol=1e-4, msg=f"{name} {key}")
    assert len(seen) == len(RUNS)


def test_resumed_is_bitwise_the_same(two_ranks: Path, shards: Path, tmp_path: Path) -> None:
    """Two steps, then the rest: losses, and the average with its statistics."""
    chosen = {name: RUNS[name] for name in ("infonce", "masked")}
    start_workers(tmp_path, 2, chosen, f"data.train={shards}/train", "run.stop_after=2")
    start_workers(tmp_path, 2, chosen, f"data.train={shards}/train", "--resume")
    for name in chosen:
        resumed, whole = (
            {line["step"]: line["loss_hex"] for line in lines(folder / name)} for folder in (tmp_path, two_ranks)
        )
        assert resumed == whole and len(whole) == 4
        average = outside(two_ranks / name)
        assert any(key.endswith("running_var") for key in average)
        for key, value in outside(tmp_path / name).items():
            assert torch.equal(value, average[key]), f"{name} {key}"
