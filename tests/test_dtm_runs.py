"""DTM through the whole program: masks, DeepSpeed, a teacher of our own making; one and two ranks, and a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from runs import Finished, train_together
from tiny_dtm import TINY

from engine.models.beit import MaskedBeit
from engine.weights.export import read_objective, write_encoder
from recipes import registry
from recipes.overrides import apply_overrides

pytestmark = pytest.mark.long  # test_exact_resume.py and test_bad_steps.py have short forms, taught by pixels
MODEL = ("model.embed_dim=32", "model.depth=2", "model.num_heads=4")
SETTINGS = (
    *MODEL, "optim.global_batch=16", "optim.micro_batch=4", "objective.images_per_draw=4", "run.log_every=1",
    "run.save_every=0", "run.steps=8", "data.threads=1", "data.brightness=0.4", "data.saturation=0.4",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(shards, tmp_path_factory) -> Path:
    """Runs `whole` and `part` (stopped after step 4, then resumed) on one rank, `two` on two; all of one teacher."""
    folder = tmp_path_factory.mktemp("dtm")
    recipe = apply_overrides(registry.load("vit_ti_dtm_demo"), list(MODEL))
    write_encoder(folder / "teacher", recipe, MaskedBeit(TINY, 32).state_dict())
    settings = ["--recipe", "vit_ti_dtm_demo", *SETTINGS, f"data.train={shards}/train", f"teacher={folder}/teacher"]
    train_together(folder, "whole=", "part=run.stop_after=4", "part=--resume", "--", *settings)
    train_together(folder, "two=", "--", *settings, ranks=2)
    return folder


def run(folder: Path, name: str) -> Finished:
    return Finished(0, "", folder / name)


def test_a_resumed_run_has_the_same_bits(folder):
    assert run(folder, "part").losses == run(folder, "whole").losses
    assert len(run(folder, "whole").losses) == 8


def test_one_and_two_ranks_have_the_same_losses_and_groups(folder):
    """Four images share their draws, so the two ranks draw different groupings within a step."""
    one, two = run(folder, "whole").metrics, run(folder, "two").metrics
    for left, right in zip(one, two, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-6) and left["groups"] == right["groups"]
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-4)
    assert len({line["groups"] for line in one}) > 4  # drawn anew at every step


def test_a_checkpoint_holds_the_student_and_not_the_teacher(folder):
    checkpoint = run(folder, "whole").newest_checkpoint()
    objective, _ = read_objective(checkpoint)
    assert {name.partition(".")[0] for name in objective.state_dict()} == {"encoder", "mask_token", "head"}
    assert objective.facts()["teacher"] in (checkpoint / "manifest.json").read_text()


def test_every_stage_and_precision_has_the_same_losses(folder):
    """Two ranks, ZeRO 0 to 3; stage 3, where small weights are divided too, comes last (it patches torch)."""
    settings = ["--recipe", "vit_ti_dtm_demo", *SETTINGS, f"data.train={data_of(folder)}", f"teacher={folder}/teacher",
                "zero.param_persistence_threshold=0"]  # fmt: skip
    stages = [(0, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16_params"), (3, "fp32"), (3, "bf16")]
    runs = {f"stage{stage}_{precision}": f"zero.stage={stage},precision={precision}" for stage, precision in stages}
    train_together(folder, *(f"{name}={overrides}" for name, overrides in runs.items()), "--", *settings, ranks=2)
    reference = run(folder, "two").metrics
    for name in runs:
        tolerance, norm_tolerance = (1e-6, 1e-3) if name.endswith("fp32") else (2e-2, 0.2)
        for line, expected in zip(run(folder, name).metrics, reference, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], abs=tolerance), name
            assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3 if tolerance == 1e-6 else 0.2), (
                name
            )


def data_of(folder: Path) -> str:
    """The training shards that the runs of `folder` were given."""
    return json.loads((folder / "two" / "recipe.json").read_text())["recipe"]["data.train"]
