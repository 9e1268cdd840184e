"""The whole program: launchers, equality on one and two ranks, resume after a kill, export, errors of a run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from runs import TIMEOUT, TINY, TRAIN, Finished, environment, kill_when, launch, read_lines, train, train_together

from engine.checkpoints.manifests import read_manifest
from engine.checkpoints.verifying import damage
from engine.runtime import Runtime

STEPS = 20
FP32 = ("precision=fp32", f"run.steps={STEPS}", "run.save_every=6")


@pytest.fixture(scope="module")
def one_rank(shards, tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("one_rank") / "run"
    return train(folder, f"data.train={shards}/train", *FP32, "run.eval_every=10")


@pytest.fixture(scope="module")
def two_ranks(shards, tmp_path_factory) -> Finished:
    folder = tmp_path_factory.mktemp("two_ranks") / "run"
    return train(folder, f"data.train={shards}/train", *FP32, "run.eval_every=10", launcher="deepspeed", ranks=2)


def test_metrics_have_the_promised_fields(one_rank):
    assert [line["step"] for line in one_rank.metrics] == list(range(1, STEPS + 1))
    for line in one_rank.metrics:
        assert float.fromhex(line["loss_hex"]) == line["loss"]
        assert line["grad_norm"] > 0 and line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1
    assert one_rank.metrics[0]["lr"] == 0 and one_rank.metrics[5]["lr"] > 0
    assert one_rank.metrics[-1]["loss"] < one_rank.metrics[0]["loss"]


def test_the_start_lines_say_what_runs(one_rank):
    for fragment in (
        "global 16 = micro 4 x 1 rank x accumulation 4", "peak 0.0015", "fp32, ZeRO stage 1", "80 samples in 4 shards",
        "departure   optim.global_batch=16 (recipe: 64)",
    ):  # fmt: skip
        assert fragment in one_rank.output


def test_one_and_two_ranks_have_the_same_losses(one_rank, two_ranks):
    assert "micro 4 x 2 ranks x accumulation 2" in two_ranks.output
    for one, two in zip(one_rank.metrics, two_ranks.metrics, strict=True):
        assert abs(one["loss"] - two["loss"]) <= 1e-5, one["step"]
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_one_and_two_ranks_have_the_same_neighbours(one_rank, two_ranks):
    assert [line["step"] for line in one_rank.evaluations] == [0, 10, 20]
    for one, two in zip(one_rank.evaluations, two_ranks.evaluations, strict=True):
        assert one["knn"] == pytest.approx(two["knn"], abs=5.01)  # one image of 20 may fall the other way


def test_nothing_is_compiled_at_start(one_rank, two_ranks):
    for run in (one_rank, two_ranks):
        assert not list((run.folder.parent / "torch_extensions").rglob("*"))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_killed_and_resumed_is_bitwise_the_same(ranks, one_rank, two_ranks, shards, tmp_path):
    """Kill -9 after step 8; step 6 was saved, so steps 7 and 8 are done twice and must come out equal."""
    whole = {1: one_rank, 2: two_ranks}[ranks]
    arguments = (f"data.train={shards}/train", *FP32)
    kill_after(8, tmp_path / "run", *arguments, launcher="deepspeed" if ranks == 2 else "python", ranks=ranks)
    saved = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    assert saved and saved[-1] < f"step_{STEPS:08d}"
    resumed = train(tmp_path / "run", *arguments, "--resume", launcher="torchrun", ranks=ranks)
    assert "resume      from step" in resumed.output and "elastic" not in resumed.output
    assert resumed.losses == whole.losses


def kill_after(step: int, folder: Path, *arguments: str, **start) -> None:
    """Start a run and kill it as soon as `step` is in its metrics."""
    metrics = folder / "metrics.jsonl"
    command = launch(TRAIN, "--recipe", "vit_ti_mae_demo", *TINY, f"run.out={folder}", *arguments, **start)
    kill_when(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text(), command, folder)


@pytest.mark.long  # tests/test_exact_resume.py and test_bad_steps.py have short forms of it
def test_every_stage_and_precision_trains_and_resumes(shards, tmp_path):
    """ZeRO 0 to 3 on two ranks: the same losses in fp32, close ones in 16 bits; stage 3 really divides the weights."""
    runs = {
        f"stage{stage}_{precision}": f"zero.stage={stage},precision={precision}"
        # Stage 3 comes last: from then on DeepSpeed replaces torch's linear function in the whole process.
        for stage, precision in [
            *((stage, "fp32") for stage in range(3)),
            (1, "bf16"),
            (2, "bf16_params"),
            (3, "fp32"),
            (3, "bf16"),
        ]  # fmt: skip
    }
    common = ("--recipe", "vit_ti_mae_demo", *TINY, f"data.train={shards}/train", "run.steps=4", "data.val=",
              "zero.param_persistence_threshold=0", "evaluation.batch=4")  # fmt: skip
    first = [f"{name}={overrides},run.stop_after=2" for name, overrides in runs.items()]
    train_together(tmp_path, *first, "--", *common, ranks=2)
    broken_off = {name: read_lines(tmp_path / name / "metrics.jsonl") for name in runs}
    again = [f"{name}={overrides}" for name, overrides in runs.items()]
    train_together(tmp_path, *again, "--", *common, "--resume", ranks=2)
    finished = {name: read_lines(tmp_path / name / "metrics.jsonl") for name in runs}
    for name, lines in finished.items():
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert lines[:2] == broken_off[name]
        tolerance = 1e-5 if name.endswith("fp32") else 2e-2
        for line, reference in zip(lines, finished["stage1_fp32"], strict=True):
            assert abs(line["loss"] - reference["loss"]) <= tolerance, name
            assert line["grad_norm"] == pytest.approx(reference["grad_norm"], rel=0.1), name


def test_timm_loads_the_exported_encoder(one_rank, shards):
    """Equal features from `timm.create_model` and from our own encoder, and the checkpoint gives the objective back."""
    from engine.weights.export import read_objective  # noqa: I001  timm imports only after our torchvision fix
    import timm

    checkpoint = one_rank.newest_checkpoint()
    objective, recipe = read_objective(checkpoint)
    model = timm.create_model(f"local-dir:{checkpoint / 'encoder'}", pretrained=True).eval()
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert (model.forward_features(images) == objective.encoder(images)).all()
    assert tuple(model.pretrained_cfg["mean"]) == recipe.data.mean and model.num_classes == 0
    assert "mask_token" not in model.state_dict() and recipe.optim.global_batch == 16


def test_a_run_folder_in_use_is_not_overwritten(one_rank, shards):
    again = train(one_rank.folder, f"data.train={shards}/train", *FP32, succeeds=False)
    assert again.returncode == 2 and "--resume" in again.output and "Traceback" not in again.output
    assert len(one_rank.metrics) == STEPS


def test_resume_refuses_another_recipe_and_says_where_it_differs(one_rank, shards):
    other = train(
        one_rank.folder, f"data.train={shards}/train", *FP32, "optim.lr=0.5", "run.log_every=3", "--resume",
        succeeds=False,
    )  # fmt: skip
    assert other.returncode == 2 and "optim.lr: 0.0015 -> 0.5" in other.output and "log_every" not in other.output


def test_resume_with_nothing_to_resume_is_an_error(shards, tmp_path):
    nothing = train(tmp_path / "run", f"data.train={shards}/train", *FP32, "--resume", succeeds=False)
    assert nothing.returncode == 2 and "no complete checkpoint" in nothing.output
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.long  # test_rank_failures.py has short forms
def test_a_failing_rank_fails_the_run(shards, tmp_path):
    command = launch(
        Path(__file__).parent / "failing_rank.py", "--recipe", "vit_ti_mae_demo", *TINY, "data.val=",
        f"data.train={shards}/train", f"run.out={tmp_path}/run", launcher="deepspeed", ranks=2,
    )  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT, env=environment(tmp_path))
    assert done.returncode != 0
    left = subprocess.run(["pgrep", "-f", f"run.out={tmp_path}/run"], capture_output=True, text=True)
    assert not left.stdout, "a rank was left behind"


def test_a_broken_checkpoint_is_passed_over(one_rank, shards, tmp_path):
    """One flipped byte in the newest checkpoint: it is named, the one before is used; what was killed is swept."""
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(one_rank.folder, folder)
    newest = one_rank.newest_checkpoint().name
    victim = folder / "checkpoints" / newest / "mp_rank_00_model_states.pt"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    (folder / "checkpoints" / ".tmp-universal-0123").mkdir()
    resumed = train(folder, f"data.train={shards}/train", *FP32, "--resume")
    assert f"{newest}: mp_rank_00_model_states.pt" in resumed.output and "from step 18" in resumed.output
    assert resumed.losses == one_rank.losses
    assert json.loads((folder / "recipe.json").read_text())["name"] == "vit_ti_mae_demo"
    world = Runtime(rank=0, world_size=1, local_rank=0, local_world_size=1, device=torch.device("cpu"))
    replaced = folder / "checkpoints" / newest
    assert damage(replaced, read_manifest(replaced), world) is None, "the broken checkpoint was not replaced"
    assert list((folder / "checkpoints").glob("broken-step_*"))
    assert not list((folder / "checkpoints").glob(".tmp-*")), "what a killed save or resume left is still there"


def test_two_trainings_do_not_share_a_folder(one_rank, shards):
    """While somebody holds the folder's lock, a second training stops before it writes anything."""
    import fcntl

    with open(one_rank.folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = train(one_rank.folder, f"data.train={shards}/train", *FP32, "--resume", succeeds=False)
    assert second.returncode == 2 and "another training is writing there" in second.output


def test_a_finished_run_resumed_is_still_finished(one_rank, shards):
    again = train(one_rank.folder, f"data.train={shards}/train", *FP32, "run.eval_every=10", "--resume")
    assert "resume      from step 20" in again.output and len(again.metrics) == STEPS


def test_a_run_that_diverges_ends_with_weights_that_are_numbers(shards, tmp_path):
    arguments = (f"data.train={shards}/train", "precision=fp32", "run.steps=40", "optim.lr=1e20", "optim.clip_grad=0")
    run = train(tmp_path / "run", *arguments, "run.save_every=1", "run.log_every=40", succeeds=False)
    assert run.returncode == 3 and "time in a row (run.max_bad_steps=3)" in run.output
    assert "Traceback" not in run.output
    from safetensors.torch import load_file

    weights = load_file(run.newest_checkpoint() / "encoder/model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_validation_with_other_classes_is_refused(shards, tmp_path):
    from conftest import make_shards
    from images import make_class_folders

    make_class_folders(tmp_path / "images", classes=3, per_class=4, seed=2)
    val = make_shards(tmp_path / "images", tmp_path / "val", samples_per_shard=20)
    run = train(tmp_path / "run", f"data.train={shards}/train", f"data.val={val}", *FP32, succeeds=False)
    assert run.returncode == 2 and "class 3 is nothing, in data.train" in run.output


def test_allowed_changes_never_reach_the_tensors(one_rank, shards):
    changed = train(
        one_rank.folder, f"data.train={shards}/train", *FP32, "model.depth=3", "--resume", "--allow-changes",
        succeeds=False,
    )  # fmt: skip
    assert changed.returncode == 2 and "holds other tensors (model.depth: 2 -> 3)" in changed.output
