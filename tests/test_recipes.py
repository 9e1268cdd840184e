"""Recipes: the papers' numbers, typed overrides, and what the command line answers without importing torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engine.plan import make_plan
from engine.start_up import departures
from engine.zero import deepspeed_config
from recipes import registry
from recipes.overrides import apply_overrides, difference, leaves, show
from recipes.schema import Optim

ROOT = Path(__file__).resolve().parents[1]
NAMES = list(registry.recipes())


def ask(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "engine/train.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={"PATH": "/usr/bin:/bin", **environment}
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_complete_and_documented(name):
    recipe = registry.load(name)
    assert "Command:" in registry.documentation(name) and registry.summary(name).endswith(".")
    assert make_plan(recipe, 10**6, 1).accumulation >= 1
    assert departures(name, recipe) == list(recipe.departures)


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads"), [("s", 384, 12, 6), ("b", 768, 12, 12), ("l", 1024, 24, 16)]
)
def test_mae_has_the_papers_numbers(name, width, depth, heads):
    """He et al., appendix A.1, Table 8."""
    values = leaves(registry.load(f"vit_{name}_mae"))
    expected = {
        "model.embed_dim": width, "model.depth": depth, "model.num_heads": heads, "model.patch_size": 16,
        "model.drop_path": 0.0, "objective.mask_ratio": 0.75, "objective.norm_pix_loss": True,
        "objective.decoder_embed_dim": 512, "objective.decoder_depth": 8, "objective.decoder_num_heads": 16,
        "optim.global_batch": 4096, "optim.blr": 1.5e-4, "optim.lr_rule": "linear", "optim.betas": (0.9, 0.95),
        "optim.weight_decay": 0.05, "optim.warmup_epochs": 40, "optim.min_lr": 0.0, "optim.clip_grad": 0.0,
        "optim.eps": 1e-8, "run.epochs": 1600, "data.scale": (0.2, 1.0), "data.image_size": 224, "data.hflip": 0.5,
    }  # fmt: skip
    assert {path: values[path] for path in expected} == expected
    assert registry.load(f"vit_{name}_mae").optim.peak_lr == pytest.approx(2.4e-3)


def test_learning_rate_rules():
    assert Optim(global_batch=1024, micro_batch=64).peak_lr == pytest.approx(6e-4)
    assert Optim(global_batch=1024, micro_batch=64, lr_rule="sqrt").peak_lr == pytest.approx(1.2e-3)
    assert Optim(global_batch=1024, micro_batch=64, lr=0.5).peak_lr == 0.5


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("optim.lr=1e-3", "optim.lr", 1e-3),
        ("data.scale=0.08,1", "data.scale", (0.08, 1.0)),
        ("objective.norm_pix_loss=false", "objective.norm_pix_loss", False),
        ("run.steps=7", "run.steps", 7),
        ("precision=fp16", "precision", "fp16"),
        ("zero.stage=3", "zero.stage", 3),
        ("run.out=a=b", "run.out", "a=b"),
    ],
)
def test_overrides_are_typed(override, path, value):
    old = registry.load("vit_b_mae")
    new = apply_overrides(old, [override])
    assert leaves(new)[path] == value and type(leaves(new)[path]) is type(value)
    assert set(difference(old, new)) == {path}


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("optim.lrr=1", "did you mean optim.lr?"),
        ("opt.lr=1", "did you mean optim.lr?"),
        ("precision=bf61", "did you mean bf16?"),
        ("zero.stage=4", "one of 0, 1, 2, 3"),
        ("run.steps=1.5", "whole number"),
        ("run.steps=many", "whole number"),
        ("optim.lr=nan", "finite"),
        ("data.scale=1", "2 values"),
        ("objective.norm_pix_loss=maybe", "true or false"),
        ("optim.micro_batch=100", "for example 64"),
        ("model.num_heads=5", "does not divide"),
        ("data.image_size=225", "not a multiple"),
        ("zero.stage=0", "zero.stage=1"),
        ("departures=x", "no such field"),
        ("optim", "form section.field=value"),
        ("optim=3", "no such field"),
        ("run.epochs=10", "warmup_epochs"),
    ],
)
def test_wrong_overrides_are_explained_in_one_line(override, fragment):
    with pytest.raises(ValueError) as error:
        apply_overrides(registry.load("vit_b_mae"), [override])
    assert fragment in str(error.value) and "\n" not in str(error.value)


IMPOSSIBLE = [
    ("model.embed_dim", "0", "-4"),
    ("model.depth", "0", "-1"),
    ("model.num_heads", "0", "-12"),
    ("model.patch_size", "0", "-16"),
    ("model.mlp_ratio", "0", "-1.5"),
    ("objective.decoder_embed_dim", "0", "-16"),
    ("objective.decoder_depth", "-1", "-8"),
    ("objective.decoder_num_heads", "0", "-16"),
    ("optim.min_lr", "-1e-9", "-1"),
    ("optim.warmup_epochs", "-0.5", "-1"),
    ("optim.weight_decay", "-0.05", "-1"),
    ("optim.betas", "1,0.9", "0.9,-0.1"),
    ("optim.eps", "0", "-1e-8"),
    ("data.image_size", "0", "-224"),
    ("data.threads", "-1", "-8"),
    ("data.hw_decoder_load", "-0.1", "1.1"),
    ("zero.param_persistence_threshold", "-1", "-100"),
    ("evaluation.knn_k", "0", "-1"),
    ("evaluation.knn_train_samples", "0", "-1"),
    ("evaluation.knn_val_samples", "0", "-1"),
    ("evaluation.knn_temperature", "0", "-0.07"),
    ("evaluation.batch", "0", "-1"),
    ("run.seed", "-1", str(2**63)),
]


@pytest.mark.parametrize(("path", "text"), [(path, text) for path, *texts in IMPOSSIBLE for text in texts])
def test_impossible_values_are_refused_by_name(path, text):
    """One line that begins with the field and the value: nothing gets as far as a division or DALI."""
    with pytest.raises(ValueError) as error:
        apply_overrides(registry.load("vit_b_mae"), [f"{path}={text}"])
    named, _, shown = str(error.value).partition(": ")[0].partition("=")
    assert named == path and [*map(float, shown.strip("()").split(","))] == [*map(float, text.split(","))]
    assert "\n" not in str(error.value)


def test_the_last_possible_values_are_accepted():
    overrides = ["objective.decoder_depth=0", "optim.betas=0,0", "optim.weight_decay=0", "data.threads=0",
                 "data.hw_decoder_load=1", "zero.param_persistence_threshold=0", "evaluation.knn_k=1",
                 f"run.seed={2**63 - 1}", "optim.warmup_epochs=0"]  # fmt: skip
    recipe = apply_overrides(registry.load("vit_b_mae"), overrides)
    assert recipe.run.seed == 2**63 - 1 and recipe.optim.betas == (0, 0)


def test_of_a_field_given_twice_the_last_value_counts():
    overrides = ["optim.lr=1", "precision=fp32", "optim.lr=2", "precision=bf16"]
    recipe = apply_overrides(registry.load("vit_b_mae"), overrides)
    assert recipe.optim.lr == 2 and recipe.precision == "bf16"


def with_hard_values(test):
    """Every field with the values that are most likely to be divided by."""
    for path in leaves(registry.load("vit_b_mae")):
        for text in ("0", "-1"):
            test = example(text, path)(test)
    return test


@with_hard_values
@given(st.text(max_size=40) | st.integers(-9, 9).map(str), st.sampled_from(list(leaves(registry.load("vit_b_mae")))))
def test_any_text_is_a_value_or_a_value_error(text, path):
    try:
        recipe = apply_overrides(registry.load("vit_b_mae"), [f"{path}={text}"])
    except ValueError:
        return
    assert apply_overrides(recipe, [f"{path}={show(leaves(recipe)[path])}"]) == recipe


def test_plan_of_the_papers_run():
    """ImageNet-1K at batch 4096: 312 steps an epoch, warm-up of 40 of them, first step at rate 0."""
    plan = make_plan(registry.load("vit_b_mae"), 1_281_167, 8)
    assert (plan.steps_per_epoch, plan.total_steps, plan.accumulation) == (312, 1600 * 312, 4)
    assert plan.warmup_steps == 40 * 312
    assert plan.lr(0) == 0 and plan.lr(40 * 312) == pytest.approx(2.4e-3) and plan.lr(plan.total_steps) == 0


def test_a_shortened_run_keeps_the_shape_of_its_schedule():
    recipe = registry.load("vit_b_mae")
    whole = make_plan(recipe, 1_281_167, 1)
    short = make_plan(apply_overrides(recipe, ["run.steps=1600"]), 1_281_167, 1)
    for tenth in range(10):
        assert short.lr(tenth * 160) == pytest.approx(whole.lr(tenth * 160 * 312))
    stopped = make_plan(apply_overrides(recipe, ["run.stop_after=9"]), 1_281_167, 1)
    assert stopped.last_step == 9 and stopped.lr(5) == whole.lr(5)


@pytest.mark.parametrize(("world_size", "fragment"), [(3, "cannot be shared"), (64, "set optim.micro_batch=64")])
def test_batches_that_do_not_come_out_even(world_size, fragment):
    with pytest.raises(ValueError, match=fragment):
        make_plan(registry.load("vit_b_mae"), 10**6, world_size)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_params", "fp16"])
def test_deepspeed_config(precision):
    recipe = apply_overrides(registry.load("vit_b_mae"), [f"precision={precision}", "zero.stage=3"])
    config = deepspeed_config(recipe, 8)
    assert config["train_batch_size"] == 4096 and config["gradient_accumulation_steps"] == 4
    enabled = {key for key in ("bf16", "fp16", "torch_autocast") if config.get(key, {}).get("enabled")}
    assert enabled == {"fp32": set(), "bf16": {"torch_autocast"}, "bf16_params": {"bf16"}, "fp16": {"fp16"}}[precision]


def test_list_print_and_mistakes_need_no_torch(tmp_path):
    poison = tmp_path / "torch.py"
    poison.write_text("raise ImportError('torch was imported')")
    listed = ask("--list", PYTHONPATH=str(tmp_path))
    assert listed.returncode == 0 and all(name in listed.stdout for name in NAMES)
    printed = ask("--recipe", "vit_b_mae", "--print", "optim.lr=1e-3", PYTHONPATH=str(tmp_path))
    assert printed.returncode == 0 and "optim.lr=0.001" in printed.stdout and "arXiv" not in printed.stderr
    wrong = ask("--recipe", "vit_b_may", PYTHONPATH=str(tmp_path))
    assert wrong.returncode == 2 and "did you mean vit_b_mae?" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1


def test_without_data_the_screen_says_how_to_get_some(tmp_path):
    told = ask("--recipe", "vit_b_mae", cwd=tmp_path)
    assert told.returncode == 2
    for needed in ("data/imagenet/train", "tools/make_shards.py", "MASKWRIGHT_DATA", "make demo"):
        assert needed in told.stderr
    assert len(told.stderr.splitlines()) <= 24 and "Traceback" not in told.stderr
    named = ask("--recipe", "vit_b_mae", cwd=tmp_path, MASKWRIGHT_DATA=str(tmp_path / "shards"))
    assert named.returncode == 2 and str(tmp_path / "shards/train") in named.stderr


def test_without_a_teacher_the_screen_says_so_beside_the_data(tmp_path):
    told = ask("--recipe", "vit_l_dtm", cwd=tmp_path)
    assert told.returncode == 2 and "Traceback" not in told.stderr
    for needed in ("tools/make_shards.py", "no teacher is named", "teacher=FILE", "--download"):
        assert needed in told.stderr
    assert len(told.stderr.splitlines()) <= 40


def test_printing_names_every_field():
    printed = ask("--recipe", "vit_ti_mae_demo", "--print").stdout
    for path, value in leaves(registry.load("vit_ti_mae_demo")).items():
        assert f"{path}={show(value)}" in printed
