"""The recipes of DTM's ablations: each differs from vit_b_dtm in what it says, and in nothing else."""

from __future__ import annotations

from dataclasses import fields

import pytest

from recipes import dtm_variants, registry
from recipes.methods.morphing import Morphing
from recipes.overrides import difference

VARIANTS = {
    "token_wise": {"objective.max_removed": 0, "objective.num_schedules": 1},
    "fixed": {
        "objective.min_removed": 98, "objective.max_removed": 98, "objective.min_steps": 7, "objective.max_steps": 7,
        "objective.num_schedules": 1,
    },
    "constant_tokens": {"objective.min_removed": 98, "objective.max_removed": 98},
    "constant_steps": {"objective.min_steps": 7, "objective.max_steps": 7},
    "exact_counts": {"objective.counts": "exact"},
    "one_schedule": {"objective.num_schedules": 1},
    "cosine": {"objective.loss": "negcosine"},
    "l1": {"objective.loss": "l1"},
    "l2": {"objective.loss": "l2"},
    "normalized_target": {"objective.normalize_target": True},
    "kmeans": {"objective.morphing": "kmeans"},
    "random_split": {"objective.split": "random"},
    "as_written": {
        "objective.split": "random", "objective.protect_first": False, "objective.counts": "exact",
        "objective.weighting": "step",
    },
    "masked_only": {"objective.loss_on": "masked"},
    "shared_positions": {"model.rel_pos_bias": False},
    "absolute_positions": {
        "model.rel_pos_bias": False, "model.shared_rel_pos_bias": False, "model.abs_pos_emb": True,
    },
    "clip_norm": {"objective.teacher_norm": "clip"},
    "pixels": {"teacher": "pixels"},
}  # fmt: skip


def test_all_variants_are_listed():
    ours = {name for name, function in registry.recipes().items() if function.__module__ == dtm_variants.__name__}
    assert ours == {f"vit_b_dtm_{what}" for what in VARIANTS} | {"vit_b_mae_dtm"}


@pytest.mark.parametrize("what", VARIANTS)
def test_a_variant_differs_from_the_recipe_in_what_it_says(what):
    base, variant = registry.load("vit_b_dtm"), registry.load(f"vit_b_dtm_{what}")
    assert {path: new for path, (_, new) in difference(base, variant).items()} == VARIANTS[what]
    told = " ".join(registry.documentation(f"vit_b_dtm_{what}").split())
    assert "Not yet run here." in told and f"--recipe vit_b_dtm_{what} " in told
    assert any("parity" in remark for remark in variant.departures) == (
        what not in ("token_wise", "kmeans", "random_split", "as_written")
    )
    assert any("smooth L1" in remark for remark in variant.departures) == (what not in ("cosine", "l1", "l2"))


def test_the_mae_hosts_recipe_is_maes_with_dtms_comparison():
    recipe, mae, dtm = (registry.load(name) for name in ("vit_b_mae_dtm", "vit_b_mae", "vit_b_dtm"))
    differing = {path for path in difference(mae, recipe) if not path.startswith("objective.")}
    assert differing == {"run.epochs"} and recipe.run.epochs == dtm.run.epochs == 300
    assert all(getattr(recipe.objective, f.name) == getattr(dtm.objective, f.name) for f in fields(Morphing))
    for name in ("mask_ratio", "decoder_embed_dim", "decoder_depth", "decoder_num_heads"):
        assert getattr(recipe.objective, name) == getattr(mae.objective, name)
    assert recipe.objective.has_teacher and "not known" in recipe.departures[0]
