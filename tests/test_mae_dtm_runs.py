"""DTM on an MAE host through the whole program, taught by pixels: a resume, two ranks, what is saved and shown."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from runs import BIN, ROOT, TIMEOUT, Finished, environment, train_together

from engine.weights.export import read_objective

pytestmark = pytest.mark.long  # every method has a shorter run of the same kind in `make test`

SETTINGS = (
    "--recipe", "vit_b_mae_dtm", "teacher=pixels", "precision=fp32", "model.embed_dim=32", "model.depth=2",
    "model.num_heads=2", "model.patch_size=8", "data.image_size=32", "objective.decoder_embed_dim=16",
    "objective.decoder_depth=1", "objective.decoder_num_heads=2", "objective.split=random", "objective.loss_on=masked",
    "objective.images_per_draw=4", "optim.global_batch=16", "optim.micro_batch=4", "optim.lr=1e-3", "run.steps=4",
    "run.log_every=1", "run.save_every=0", "data.threads=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(shards, tmp_path_factory) -> Path:
    """Runs `whole` and `part` (stopped after step 2, then resumed) on one rank, `two` on two."""
    folder = tmp_path_factory.mktemp("mae_dtm")
    settings = ["--", *SETTINGS, f"data.train={shards}/train"]
    train_together(folder, "whole=", "part=run.stop_after=2", "part=--resume", *settings)
    train_together(folder, "two=", *settings, ranks=2)
    return folder


def run(folder: Path, name: str) -> Finished:
    return Finished(0, "", folder / name)


def test_a_resumed_run_has_the_same_bits(folder):
    assert run(folder, "part").losses == run(folder, "whole").losses
    assert len(run(folder, "whole").losses) == 4 and len(set(run(folder, "whole").losses.values())) == 4


def test_one_and_two_ranks_have_the_same_losses(folder):
    """Though every image divides its tokens at random, by draws of its own."""
    for left, right in zip(run(folder, "whole").metrics, run(folder, "two").metrics, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-6) and left["groups"] == right["groups"]


def test_a_checkpoint_gives_the_objective_back(folder):
    objective, recipe = read_objective(run(folder, "whole").newest_checkpoint())
    assert {name.partition(".")[0] for name in objective.state_dict()} == {"encoder", "decoder"}
    assert objective.facts() == {"teacher": "pixels"} and recipe.teacher == "pixels"


@pytest.mark.parametrize(("analysis", "returncode"), [("views", 0), ("morphs", 0), ("reconstructions", 2)])
def test_pictures_of_what_it_sees_and_groups(folder, shards, analysis, returncode):
    out = folder / f"{analysis}.png"
    command = [BIN / "python", ROOT / "tools/analyze.py", analysis, run(folder, "whole").newest_checkpoint(),
               "--data", shards / "val", "--out", out, "--images", "4"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, cwd="/", env=environment(folder))
    assert done.returncode == returncode, done.stderr[-3000:]
    assert out.exists() == (returncode == 0)
    assert returncode == 0 or "was trained by MAEDTM; views and morphs fit it" in done.stderr
