"""LUT's and MAE's ablation recipes, the settings that are refused, and what the start says of the batch."""

from __future__ import annotations

from typing import Any

import pytest

from engine.start_up import batch_norm_lines
from recipes import lut_variants, registry
from recipes.overrides import apply_overrides, difference

# --- the recipes ----------------------------------------------------------------------------------------------------

BASE, MAE = "vit_b_lut_400ep", "vit_b_mae_400ep"
SHARED, BATCH = {"data.shared_crop": True}, {"objective.teacher_bn": "batch"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    BASE: ("vit_b_lut", {"run.epochs": 400}),
    MAE: ("vit_b_mae", {"run.epochs": 400}),
    "vit_b_mae_400ep_src": (MAE, {"data.crop": "src"}),
    "vit_b_mae_400ep_raw_pixels": (MAE, {"objective.norm_pix_loss": False}),
    "vit_b_lut_400ep_rrc": (BASE, {"data.crop": "rrc"}),
    "vit_b_lut_400ep_shared_crop": (BASE, SHARED),
    "vit_b_lut_400ep_infonce": (BASE, {"objective.bc_loss": "infonce"}),
    "vit_b_lut_400ep_smooth_l1": (BASE, {"objective.bc_loss": "smooth_l1"}),
    "vit_b_lut_400ep_cls": (BASE, {"objective.bc_tokens": "cls"}),
    "vit_b_lut_400ep_tokenwise": (BASE, SHARED | {"objective.bc_tokens": "tokenwise"}),
    "vit_b_lut_400ep_pooled_tokenwise": (BASE, SHARED | {"objective.bc_tokens": "pooled_tokenwise"}),
    "vit_b_lut_400ep_masked": (BASE, BATCH | {"objective.bc_tokens": "masked"}),
    "vit_b_lut_400ep_teacher_mask_25": (BASE, {"objective.teacher_mask_ratio": 0.25}),
    "vit_b_lut_400ep_teacher_mask_50": (BASE, {"objective.teacher_mask_ratio": 0.5}),
    "vit_b_lut_400ep_teacher_mask_75": (BASE, {"objective.teacher_mask_ratio": 0.75}),
    "vit_b_lut_400ep_teacher_batch_bn": (BASE, BATCH),
    "vit_b_lut_400ep_one_way": (BASE, {"objective.symmetric": False}),
    "vit_b_lut_400ep_no_predictor": (BASE, {"objective.predictor_depth": 0}),
    "vit_b_lut_400ep_head_ln": (BASE, {"objective.head_norm": "ln"}),
    "vit_b_lut_400ep_head_no_norm": (BASE, {"objective.head_norm": "none"}),
    "vit_b_lut_400ep_linear_lr": (BASE, {"optim.lr_rule": "linear"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_differs_by_what_its_name_says(name: str) -> None:
    base, expected = VARIANTS[name]
    found = difference(registry.load(base), registry.load(name))
    assert {path: new for path, (_, new) in found.items()} == expected
    assert set(registry.load(name).departures) >= set(registry.load(base).departures)
    text = " ".join(registry.documentation(name).split())
    assert f"--recipe {name} data.train=DIR" in text and "Not yet run here" in text


def test_every_variant_is_in_the_table() -> None:
    defined = {name for name, make in registry.recipes().items() if make.__module__ == lut_variants.__name__}
    assert defined == set(VARIANTS)


def test_the_linear_rule_is_another_rate_at_other_batches() -> None:
    """Equal at 4096, as its docstring says."""
    base, linear = registry.load(BASE), registry.load("vit_b_lut_400ep_linear_lr")
    assert base.optim.peak_lr == pytest.approx(2.4e-3) == linear.optim.peak_lr
    smaller = [apply_overrides(recipe, ["optim.global_batch=1024"]).optim.peak_lr for recipe in (base, linear)]
    assert smaller == pytest.approx([1.2e-3, 6e-4])


# --- what depends on the batch --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ((), ["batch norm  over micro 128 x ranks 8 = 1,024 images"]),
        (("objective.bc_loss=infonce", "objective.head_norm=ln"), ["InfoNCE     among micro 128 x ranks 8 = 1,024"]),
        (("objective.head_norm=none",), []),
        (("objective.head_depth=1", "objective.predictor_depth=0"), []),
        (("objective.norm_batch=512",), ["= 1,024 images: WARNING, the recipe means 512; features will differ"]),
        (
            ("objective.bc_loss=infonce", "optim.micro_batch=64"),
            ["batch norm  over micro 64", "InfoNCE     among micro 64"],
        ),
    ],
)
def test_the_start_says_what_depends_on_the_batch(changes: tuple[str, ...], expected: list[str]) -> None:
    lines = batch_norm_lines(apply_overrides(registry.load("vit_b_lut"), list(changes)), 8)
    assert len(lines) == len(expected) and all(part in line for part, line in zip(expected, lines, strict=True))
    assert all(("WARNING" in line) == ("1,024 images" not in line or "512" in line) for line in lines)


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        (["bc_temperature=0"], ["bc_temperature=0", "positive"]),
        (["bc_temperature=0.1"], ["bc_temperature=0.1", "bc_loss=l2norm"]),
        (["teacher_mask_ratio=1"], ["teacher_mask_ratio=1", "[0, 1)"]),
        (["teacher_mask_ratio=0.999"], ["teacher_mask_ratio=0.999", "none of 196"]),
        (["mask_ratio=1e-17"], ["mask_ratio=1e-17", "none of 196", "larger"]),
        (["mask_ratio=0.999"], ["mask_ratio=0.999", "none of 196", "smaller"]),
        (["bc_tokens=tokenwise"], ["bc_tokens=tokenwise", "data.shared_crop=true"]),
        (["bc_tokens=pooled_tokenwise"], ["bc_tokens=pooled_tokenwise", "data.shared_crop=true"]),
        (["bc_tokens=masked"], ["bc_tokens=masked", "teacher_bn=running", "teacher_bn=batch"]),
        (["bc_tokens=tokenwise", "teacher_mask_ratio=0.5"], ["teacher_mask_ratio=0.5", "bc_tokens=tokenwise"]),
        (["teacher_bn=batch", "head_norm=ln"], ["teacher_bn=batch", "head_norm=ln"]),
        (["teacher_bn=batch", "head_depth=1"], ["teacher_bn=batch", "head_depth=1"]),
        (["head_norm=ln", "head_depth=1", "predictor_depth=0"], ["head_norm=ln", "head_depth=1", "predictor_depth=0"]),
        (["head_act=gelu", "head_depth=0", "predictor_depth=1"], ["head_act=gelu", "head_depth=0"]),
        (["head_depth=-1"], ["head_depth=-1"]),
        (["w_mae=0", "w_bc=0"], ["w_mae=0", "w_bc=0"]),
        (["norm_batch=0"], ["norm_batch=0"]),
        (["bc_loss=mse"], ["l2norm, infonce, smooth_l1"]),
    ],
)
def test_contradictions_are_refused_in_one_line(changes: list[str], fragments: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        apply_overrides(registry.load("vit_b_lut"), [f"objective.{change}" for change in changes])
    assert all(fragment in str(error.value) for fragment in fragments) and "\n" not in str(error.value), error.value


@pytest.mark.parametrize("name", ["vit_b_mae", "vit_b_dtm", "vit_b_mae_dtm"])
def test_a_shared_crop_needs_two_images(name) -> None:
    with pytest.raises(ValueError, match=r"data.shared_crop=true: this objective has 1 view"):
        apply_overrides(registry.load(name), ["data.shared_crop=true"])
    apply_overrides(registry.load("vit_b_lut"), ["data.shared_crop=true"])
