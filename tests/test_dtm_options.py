"""No option of DTM is idle: each field, changed, changes what a tiny model computes, and contradictions are refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_dtm import TINY, TINY_DECODER, TINY_VIT, batch_of, tiny
from torch import nn

from engine.objectives.comparison import MorphedComparison
from engine.objectives.dtm import DynamicTokenMorphing
from engine.objectives.mae_dtm import MorphedAutoencoder
from engine.teachers import PixelTeacher
from recipes import registry
from recipes.methods import Dtm, MaeDtm
from recipes.methods.morphing import Morphing
from recipes.overrides import apply_overrides
from recipes.schema import Model

IMAGE_SIZE, IMAGES, STEPS = 32, 8, 3

# --- every field changes something ----------------------------------------------------------------------------------

# A field, its other value, and where it needs them the settings under which it acts.
COMPARISON = {
    "morphing": ("kmeans", {}),
    "num_schedules": (3, {}),
    "min_removed": (12, {}),
    "max_removed": (3, {}),
    "min_steps": (9, {}),
    "max_steps": (1, {}),
    "counts": ("exact", {}),
    "split": ("random", {}),
    "protect_first": (False, {}),
    "weighting": ("step", {}),
    "kmeans_iterations": (1, {"morphing": "kmeans"}),
    "images_per_draw": (2, {}),
    "loss": ("l1", {}),
    "beta": (0.5, {}),
    "loss_on": ("masked", {}),
    "normalize_target": (True, {}),
}
DTM = COMPARISON | {"num_masked": (3, {}), "min_block": (5, {})}
MAE_DTM = COMPARISON | {
    "mask_ratio": (0.5, {}),
    "decoder_embed_dim": (8, {}),
    "decoder_depth": (2, {}),
    "decoder_num_heads": (4, {}),
}
BEIT = {
    "embed_dim": 16,
    "depth": 3,
    "num_heads": 2,
    "patch_size": 16,
    "mlp_ratio": 2.0,
    "drop_path": 0.5,
    "init_values": 0.3,
    "rel_pos_bias": False,
    "shared_rel_pos_bias": False,
    "abs_pos_emb": True,
}
# Fields that no step of a tiny model shows, why, and the test that shows them.
ELSEWHERE = {
    "teacher_norm": ("acts where a teacher is opened", "test_teachers.py", "test_teacher_norm_reaches_the_teacher"),
    "architecture": ("is one with the method", "test_dtm.py", "test_methods_and_architectures_must_match"),
}


def objective_of(settings: Morphing, model: Model) -> MorphedComparison:
    """With fresh weights, the same for the same shapes; taught by pixels, which follow the patch size."""
    kind = DynamicTokenMorphing if isinstance(settings, Dtm) else MorphedAutoencoder
    torch.manual_seed(0)
    teacher = PixelTeacher(model.patch_size, model.num_patches(IMAGE_SIZE))
    return kind(settings, model, IMAGE_SIZE, teacher=teacher, seed=0)


def outcome(settings: Morphing, model: Model) -> list:
    """Shapes of the parameters, losses and gradient of three steps in training mode."""
    objective = objective_of(settings, model).train()
    ids = np.arange(IMAGES)
    masks = {name: torch.from_numpy(array) for name, array in objective.masks.drawn(0, 0, ids).items()}
    coarse = torch.randn(IMAGES, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    images = nn.functional.interpolate(coarse, IMAGE_SIZE, mode="bilinear")  # neighbouring patches are alike
    batch = SimpleNamespace(views=(images,), positions=torch.from_numpy(ids), **masks)
    losses = [objective(batch, step)["loss"] for step in range(STEPS)]
    torch.stack(losses).sum().backward()
    shapes = {name: tuple(parameter.shape) for name, parameter in objective.named_parameters()}
    gradients = [p.grad.norm().item() for p in objective.parameters() if p.grad is not None]
    return [shapes, [loss.item() for loss in losses], gradients]


def fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_the_tables_name_every_field():
    """A new field without a line here, or without a reason and a test elsewhere, fails."""
    assert fields(Dtm) - ELSEWHERE.keys() == DTM.keys()
    assert fields(MaeDtm) - ELSEWHERE.keys() == MAE_DTM.keys()
    assert fields(Model) - ELSEWHERE.keys() == BEIT.keys()
    for _, file, test in ELSEWHERE.values():
        assert f"def {test}(" in (Path(__file__).parent / file).read_text()


@pytest.mark.parametrize("field", DTM)
def test_every_field_of_dtm_has_an_effect(field):
    value, context = DTM[field]
    base = Dtm(num_masked=6, min_block=2, **context)
    changed = dataclasses.replace(base, **{field: value})
    assert outcome(base, TINY) == outcome(base, TINY) != outcome(changed, TINY)


@pytest.mark.parametrize("field", MAE_DTM)
def test_every_field_of_dtm_on_mae_has_an_effect(field):
    value, context = MAE_DTM[field]
    base = MaeDtm(**TINY_DECODER, **context)
    changed = dataclasses.replace(base, **{field: value})
    assert outcome(base, TINY_VIT) == outcome(base, TINY_VIT) != outcome(changed, TINY_VIT)


@pytest.mark.parametrize("field", BEIT)
def test_every_field_of_the_beit_has_an_effect(field):
    settings = Dtm(num_masked=2, min_block=2)
    changed = dataclasses.replace(TINY, **{field: BEIT[field]})
    assert outcome(settings, TINY) == outcome(settings, TINY) != outcome(settings, changed)


@pytest.mark.parametrize("loss", ["smooth_l1", "l1", "l2", "negcosine"])
@pytest.mark.parametrize("loss_on", ["all", "masked", "visible"])
def test_without_morphing_every_distance_is_the_one_of_its_name(loss, loss_on):
    """Token by token, over the tokens that count, by torch's own functions."""
    objective = tiny(Dtm(num_masked=6, max_removed=0, num_schedules=1, loss=loss, loss_on=loss_on)).double()
    batch = batch_of(4)
    batch.views = (batch.views[0].double(),)
    predictions, targets = objective.predict(*batch.views, batch.mask), objective.teacher(*batch.views).double()
    counted = {"all": batch.mask | True, "masked": batch.mask, "visible": ~batch.mask}[loss_on]
    p, t = predictions[counted], targets[counted]
    expected = {
        "smooth_l1": lambda: nn.functional.smooth_l1_loss(p, t, beta=2.0),
        "l1": lambda: nn.functional.l1_loss(p, t),
        "l2": lambda: nn.functional.mse_loss(p, t),
        "negcosine": lambda: 1 - nn.functional.cosine_similarity(p, t, dim=-1).mean(),
    }[loss]()
    assert objective(batch, 0)["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_loss_on_a_part_is_the_mean_over_it():
    """With morphing: all tokens together are the weighted mean of masked and visible ones."""
    losses = {}
    for loss_on in ("all", "masked", "visible"):
        objective = tiny(Dtm(num_masked=6, loss_on=loss_on)).double()
        losses[loss_on] = objective(batch_of(4), 1)["loss"].item()
    assert losses["masked"] != losses["visible"]
    assert losses["all"] == pytest.approx(6 / 16 * losses["masked"] + 10 / 16 * losses["visible"], rel=1e-6)


def test_the_loss_is_the_mean_over_the_schedules():
    objective = tiny(Dtm(num_masked=6, num_schedules=5)).double()
    batch = batch_of(4)
    whole = objective(batch, 2)
    drawn = objective.draws(0, 2, 16)
    assert len(drawn) == 5
    alone = []
    for draw in drawn:
        objective.draws = lambda block, step, num_tokens, one=draw: [one]
        alone.append(objective(batch, 2))
    assert whole["loss"].item() == pytest.approx(np.mean([one["loss"].item() for one in alone]), rel=1e-12)
    assert whole["groups"].item() == pytest.approx(np.mean([one["groups"].item() for one in alone]))


def test_kmeans_has_as_many_clusters_as_tokens_are_left():
    settings = Dtm(num_masked=6, morphing="kmeans", min_removed=11, max_removed=11)
    metrics = tiny(settings)(batch_of(4), 0)
    assert metrics["groups"] == 5 and metrics["loss"].isfinite()
    everything = Dtm(num_masked=6, morphing="kmeans", min_removed=16, max_removed=16)
    assert tiny(everything)(batch_of(4), 0)["groups"] == 1  # no fewer than one


# --- contradictions -------------------------------------------------------------------------------------------------

BEIT_REFUSED = [
    (["num_schedules=0"], "objective.num_schedules=0: at least 1 is needed"),
    (["min_steps=0"], "objective.min_steps=0: at least 1 is needed"),
    (["min_removed=-1"], "objective.min_removed=-1: 0 or more tokens are needed"),
    (["max_removed=-1"], "objective.max_removed=-1: 0 or more tokens are needed"),
    (["kmeans_iterations=0"], "objective.kmeans_iterations=0: at least 1 is needed"),
    (["max_steps=197"], "objective.max_steps=197: an image has 196 tokens"),
    (["min_removed=197"], "objective.min_removed=197: an image has 196 tokens"),
    (["max_removed=197"], "objective.max_removed=197: an image has 196 tokens"),
    (["min_removed=9", "max_removed=8"], "objective.min_removed=9: above objective.max_removed=8"),
    (["min_steps=15"], "objective.min_steps=15: above objective.max_steps=14"),
    (["num_masked=196", "loss_on=visible"], "objective.loss_on=visible: 196 of 196 patches are masked"),
    (["num_masked=0", "loss_on=masked"], "objective.loss_on=masked: 0 of 196 patches are masked"),
    (["kmeans_iterations=3"], "objective.kmeans_iterations=3: objective.morphing=bipartite has no use for it"),
    (["loss=l1", "beta=1"], "objective.beta=1.0: objective.loss=l1 has no use for it; leave it at 2.0"),
    *(
        (["morphing=kmeans", change], f"objective.{change}: objective.morphing=kmeans has no use for it")
        for change in (
            "split=random",
            "protect_first=false",
            "counts=exact",
            "weighting=step",
            "min_steps=2",
            "max_steps=3",
        )
    ),
]


@pytest.mark.parametrize(("changes", "message"), BEIT_REFUSED)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        apply_overrides(registry.load("vit_b_dtm"), [f"objective.{change}" for change in changes])
    assert str(error.value).startswith(message.partition(":")[0]) and "\n" not in str(error.value)


def test_the_mae_host_refuses_what_mae_and_dtm_refuse():
    for change, message in (
        ("mask_ratio=1", "objective.mask_ratio=1.0: a share strictly between 0 and 1"),
        ("mask_ratio=0.999", "objective.mask_ratio=0.999: leaves none of 196 patches"),
        ("decoder_num_heads=7", "objective.decoder_embed_dim=512: must be divisible by 4 and by"),
        ("max_steps=197", "objective.max_steps=197: an image has 196 tokens"),
        ("num_schedules=0", "objective.num_schedules=0"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            apply_overrides(registry.load("vit_b_mae_dtm"), [f"objective.{change}"])


def test_the_last_possible_settings_are_accepted():
    for changes in (
        ["max_steps=196", "min_steps=196"],
        ["min_removed=196", "max_removed=196"],
        ["num_masked=195", "loss_on=visible"],
        ["num_masked=1", "min_block=1", "loss_on=masked"],
        ["num_masked=196"],
        ["morphing=kmeans", "kmeans_iterations=1"],
    ):
        apply_overrides(registry.load("vit_b_dtm"), [f"objective.{change}" for change in changes])
    few = [
        "data.image_size=48",
        "objective.num_masked=3",
        "objective.min_block=1",
        "objective.morphing=kmeans",
    ]  # 9 tokens, 14 steps of no use
    assert apply_overrides(registry.load("vit_b_dtm"), few).num_patches == 9
