"""DTM's student, its draws and its recipes. Its numbers: test_golden.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_files import read, state
from golden_weights import place_whole
from tiny_dtm import TINY, TINY_DECODER, batch_of, part_of, tiny, tiny_mae
from torch import nn

from engine.models.beit import MaskedBeit, beit_arguments
from engine.morphing import group_tokens
from engine.objectives.comparison import Draw
from engine.objectives.dtm import DynamicTokenMorphing
from engine.params import parameter_groups
from recipes import registry, sizes
from recipes.methods import Dtm, MaeDtm
from recipes.overrides import apply_overrides, leaves
from recipes.schema import Model
from shards.draws.philox import Stream

# isort: split
import timm

# --- the student ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released() -> DynamicTokenMorphing:
    """Our module with the released program's weights, in float64."""
    objective = tiny().double()
    place_whole(objective, state(read("dtm_student_both_rpb.npz"), "w."))
    return objective


def test_student_without_mask_is_timms(released):
    """Same keys, same tokens: what is exported is timm's model."""
    plain = timm.create_model("beit_base_patch16_224", **beit_arguments(TINY, 32)).double()
    plain.load_state_dict(released.encoder.state_dict(), strict=True)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    nothing = torch.zeros(2, 16, dtype=torch.bool)
    expected = plain.forward_features(images)
    torch.testing.assert_close(released.encoder(images), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(released.encoder(images, nothing, released.mask_token), expected, rtol=0, atol=1e-12)


def test_a_masked_patch_is_not_seen(released):
    batch = batch_of(2)
    images, changed = batch.views[0].double(), batch.views[0].double().clone()
    row, column = divmod(batch.mask[0].nonzero()[0].item(), 4)
    changed[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 1
    assert (released.predict(changed, batch.mask) == released.predict(images, batch.mask)).all()
    assert (released.predict(changed, None) != released.predict(images, None)).any()


def test_sixteen_bit_weights_and_buffers_of_32():
    """What DeepSpeed's bf16 mode makes of the model: parameters are cast, timm's constant k_bias is not."""
    objective, exact = tiny().bfloat16(), tiny()
    for block in objective.encoder.blocks:
        block.attn.k_bias = block.attn.k_bias.float()
    loss = objective(batch_of(4), 0)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact(batch_of(4), 0)["loss"].item(), rel=0.02)


def test_initial_weights():
    """docs/methods.md: truncated at one standard deviation, deeper branches smaller, tables zero."""
    torch.manual_seed(0)
    encoder = MaskedBeit(Model(architecture="beit", embed_dim=192, depth=3, num_heads=3, init_values=0.1), 224)
    for weight in (encoder.patch_embed.proj.weight, encoder.blocks[1].attn.qkv.weight, encoder.cls_token):
        assert weight.abs().max() <= 0.02
    assert encoder.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02 * 0.5396, rel=0.02)
    for number, block in enumerate(encoder.blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.abs().max().item() == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.02)
        assert (block.gamma_1 == 0.1).all() and (block.gamma_2 == 0.1).all()
        assert (block.attn.relative_position_bias_table == 0).all() and (block.attn.q_bias == 0).all()
    assert (encoder.rel_pos_bias.relative_position_bias_table == 0).all()
    assert (encoder.patch_embed.proj.bias == 0).all() and (encoder.blocks[2].mlp.fc1.bias == 0).all()
    objective = tiny()
    assert objective.mask_token.abs().max() <= 0.02 and objective.head.weight.abs().max() <= 0.02
    assert (objective.head.bias == 0).all()


def test_number_of_parameters():
    """ViT-S with a head of 512 (measured on the released program); the mask token and the class token included."""
    encoder = MaskedBeit(registry.load("vit_s_dtm").model, 224)
    head_and_mask_token = 384 * 512 + 512 + 384
    assert sum(p.numel() for p in encoder.parameters()) + head_and_mask_token == 21_849_224


# --- groupings ------------------------------------------------------------------------------------------------------


WAYS = [
    {},
    {"split": "random"},
    {"split": "random", "protect_first": False, "counts": "exact", "weighting": "step", "loss_on": "visible"},
    {"morphing": "kmeans", "loss_on": "masked"},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(map(str, way.values())) or "released")
@pytest.mark.parametrize("host", ["beit", "mae"])
def test_loss_and_gradient_do_not_depend_on_the_division_of_the_batch(host, way):
    """All images at once, or in micro-batches that do and do not respect the blocks that share their draws."""
    if host == "beit":
        objective = tiny(Dtm(num_masked=6, images_per_draw=16, **way)).double()
        weight = objective.head.weight
    else:
        objective = tiny_mae(MaeDtm(images_per_draw=16, **TINY_DECODER, **way)).double()
        weight = objective.decoder.pred.weight
    batch = batch_of(40, first=8)  # blocks of 8, 16 and 16 images
    batch.views = (batch.views[0].double(),)
    whole = objective(batch, 3)
    whole["loss"].backward()
    gradient = weight.grad.clone()
    for cuts in ([0, 8, 24, 40], [0, 10, 20, 30, 40], [0, 1, 40]):
        objective.zero_grad()
        loss = groups = 0.0
        for start, end in zip(cuts, cuts[1:], strict=False):
            metrics = objective(part_of(batch, slice(start, end)), 3)
            (metrics["loss"] * (end - start) / 40).backward()
            loss += metrics["loss"].item() * (end - start) / 40
            groups += metrics["groups"].item() * (end - start) / 40
        assert loss == pytest.approx(whole["loss"].item(), rel=1e-7)  # targets are fp32
        assert groups == pytest.approx(whole["groups"].item())
        torch.testing.assert_close(weight.grad, gradient, rtol=1e-6, atol=1e-9)


def test_keys_are_functions_of_seed_step_position_and_schedule():
    """What divides the tokens of a step, and what k-means begins with: anew for each, and independent of the others."""
    objective, positions = tiny(Dtm(num_masked=6)), torch.tensor([5, 1000, 7])
    for stream in (Stream.SPLIT, Stream.CLUSTER):
        keys = objective.keys(stream, positions, 17, 0, 64)
        assert keys.dtype == torch.int64 and keys.shape == (3, 64) and keys.min() >= 0 and keys.max() < 2**32
        assert torch.equal(objective.keys(stream, positions.flip(0), 17, 0, 64), keys.flip(0))
        assert torch.equal(objective.keys(stream, positions, 17, 21, 30), keys[:, 21:51])  # any part of the row
        others = [
            objective.keys(stream, positions + 1, 17, 0, 64),
            objective.keys(stream, positions, 18, 0, 64),
            objective.keys(stream, positions, 17, 64, 64),
            tiny(seed=1).keys(stream, positions, 17, 0, 64),
        ]
        assert all((keys != other).float().mean() > 0.99 for other in others) and len(keys.unique()) > 185
    split, cluster = (objective.keys(stream, positions, 17, 0, 64) for stream in (Stream.SPLIT, Stream.CLUSTER))
    assert (split != cluster).float().mean() > 0.99


@pytest.mark.parametrize("way", [{"split": "random"}, {"morphing": "kmeans"}])
def test_groups_are_drawn_anew_for_every_image_schedule_and_step(way):
    """The same tokens, seen from two images, schedules and optimizer steps; and from the same ones again."""
    objective = tiny(Dtm(num_masked=6, **way))
    tokens = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1)
    drawn, positions = {}, torch.tensor([3, 4])
    for schedule, step in ((0, 0), (1, 0), (0, 1)):
        groups, again = (objective.group(tokens, Draw(8, 2), positions, step, schedule) for _ in range(2))
        assert torch.equal(again.labels, groups.labels)
        drawn |= {(row, schedule, step): str(groups.labels[row].tolist()) for row in range(2)}
    assert len(set(drawn.values())) == 6


def test_every_iteration_draws_its_own_sets():
    """The words of (seed, step, position) in a row: N for the first iteration, N for the second."""
    objective, positions = tiny(Dtm(num_masked=6, split="random")), torch.tensor([3, 4])
    tokens = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
    keys = objective.keys(Stream.SPLIT, positions, 0, 0, 32).unflatten(1, (2, 16))
    for num_steps in (1, 2):
        groups = objective.group(tokens, Draw(8, num_steps), positions, 0, 0)
        assert torch.equal(groups.labels, group_tokens(tokens, 8, num_steps, keys=keys[:, :num_steps]).labels)
    swapped = group_tokens(tokens, 8, 2, keys=keys.flip(1))
    assert (swapped.labels != groups.labels).any()


def test_every_division_into_two_sets_is_equally_likely():
    """Each of the 15 free tokens is in the first set of an iteration as often as the others."""
    keys = tiny().keys(Stream.SPLIT, torch.arange(4000), 2, 16 * 16, 16)  # those of the second schedule
    places = keys[:, 1:].argsort(1).argsort(1) + 1
    share = (places % 2 == 0).double().mean(0)  # 7 of 15 places are even
    assert (share - 7 / 15).abs().max() < 5 * (7 / 15 * 8 / 15 / 4000) ** 0.5


def test_draws_are_functions_of_seed_step_and_block():
    objective = tiny()
    place = (3, 17, 196)
    assert objective.draws(*place) == tiny().draws(*place)
    others = [objective.draws(4, 17, 196), objective.draws(3, 18, 196), tiny(seed=1).draws(*place)]
    assert objective.draws(*place) not in others
    assert len(objective.draws(*place)) == 2 and objective.draws(*place)[0] != objective.draws(*place)[1]


def test_draws_are_uniform():
    """Removed tokens in 0 ... 196 and steps in 1 ... 14, both ends included, for each of the two groupings."""
    objective = tiny()
    drawn = np.array([objective.draws(block, step, 196) for step in range(500) for block in range(8)])  # [4000, 2, 2]
    for grouping in (0, 1):
        removed, steps = drawn[:, grouping, 0], drawn[:, grouping, 1]
        assert removed.min() == 0 and removed.max() == 196 and set(steps) == set(range(1, 15))
        assert abs(removed.mean() - 98) < 4 * 57 / 4000**0.5 and abs(steps.mean() - 7.5) < 4 * 4.03 / 4000**0.5
        assert np.bincount(steps).max() < 4000 / 14 + 5 * (4000 / 14) ** 0.5
    assert abs(np.corrcoef(drawn.reshape(4000, 4).T) - np.eye(4)).max() < 0.07


def test_draws_stay_in_their_ranges():
    """Both ends included; a range of one number is always that number."""

    def drawn(**settings: int) -> np.ndarray:
        objective = tiny(Dtm(num_masked=6, num_schedules=3, **settings))
        return np.array([objective.draws(block, 0, 16) for block in range(2000)])  # [2000, 3, 2]

    ranges = drawn(min_removed=3, max_removed=9, min_steps=2, max_steps=5)
    assert ranges.shape == (2000, 3, 2)
    for grouping in range(3):
        assert set(ranges[:, grouping, 0]) == set(range(3, 10)) and set(ranges[:, grouping, 1]) == {2, 3, 4, 5}
        assert np.bincount(ranges[:, grouping, 0]).max() < 2000 / 7 + 5 * (2000 / 7) ** 0.5
    assert set(drawn(min_removed=8)[..., 0].flat) == set(range(8, 17))
    fixed = drawn(min_removed=8, max_removed=8, min_steps=4, max_steps=4)
    assert (fixed == [8, 4]).all()
    constant_tokens, constant_steps = drawn(min_removed=8, max_removed=8), drawn(min_steps=4, max_steps=4)
    assert (constant_tokens[..., 0] == 8).all() and set(constant_tokens[..., 1].flat) == set(range(1, 15))
    assert (constant_steps[..., 1] == 4).all() and set(constant_steps[..., 0].flat) == set(range(17))


def test_without_morphing_it_is_the_distance_token_by_token():
    objective = tiny(Dtm(num_masked=6, max_removed=0, num_schedules=1)).double()
    batch = batch_of(4)
    images = batch.views[0].double()
    predictions, targets = objective.predict(images, batch.mask), objective.teacher(images).double()
    error = nn.functional.smooth_l1_loss(predictions, targets, beta=2.0)
    batch.views = (images,)
    metrics = objective(batch, 0)
    assert metrics["loss"].item() == pytest.approx(error.item(), rel=1e-5) and metrics["groups"] == 16


def test_training_leaves_the_teacher_alone():
    """It is nowhere where training could find it, and after steps it has the same bits; the student has not."""
    objective = tiny()
    theirs = {id(p) for p in objective.teacher.parameters()}
    assert theirs and not theirs & {id(p) for p in objective.parameters()}
    assert not any("teacher" in name for name in [*objective.state_dict(), *dict(objective.named_modules())])
    assert objective.facts() == {"teacher": objective.teacher.identity}
    before = [p.clone() for p in objective.teacher.parameters()]
    start = {name: p.detach().clone() for name, p in objective.named_parameters()}
    objective.train().to(torch.float64).to(torch.float32)
    assert not objective.teacher.training and not objective.teacher.network.training
    optimizer = torch.optim.AdamW(parameter_groups(objective, 0.05, objective.no_decay), lr=1e-3)
    for step in range(3):
        objective(batch_of(4), step)["loss"].backward()
        optimizer.step()
    assert all((old == new).all() for old, new in zip(before, objective.teacher.parameters(), strict=True))
    assert all(p.grad is None and not p.requires_grad for p in objective.teacher.parameters())
    for name, parameter in objective.named_parameters():
        assert parameter.grad.abs().sum() > 0 and (parameter != start[name]).any(), name


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "scale"), [("s", 0.1), ("b", 0.1), ("l", 1e-5)])
def test_recipes_have_the_papers_numbers(name, scale):
    """docs/methods.md, DTM, with the choices of its table."""
    values, plain = leaves(registry.load(f"vit_{name}_dtm")), getattr(sizes, f"VIT_{name.upper()}")
    expected = {
        "model.architecture": "beit", "model.init_values": scale, "model.embed_dim": plain.embed_dim,
        "model.depth": plain.depth, "model.num_heads": plain.num_heads, "model.patch_size": 16, "model.drop_path": 0.0,
        "objective.num_masked": 75, "objective.min_block": 16, "objective.num_schedules": 2,
        "objective.max_removed": None, "objective.max_steps": 14, "objective.images_per_draw": 128,
        "objective.loss": "smooth_l1", "objective.beta": 2.0, "objective.normalize_target": False,
        "objective.teacher_norm": "student", "optim.global_batch": 1024, "optim.blr": 1.5e-3,
        "optim.lr_rule": "sqrt_2048", "optim.lr": None, "optim.min_lr": 1e-5, "optim.warmup_epochs": 10,
        "optim.warmup_end": "within", "optim.weight_decay": 0.05, "optim.betas": (0.9, 0.98), "optim.eps": 1e-8,
        "optim.clip_grad": 3.0, "run.epochs": 300, "data.scale": (0.2, 1.0), "data.image_size": 224,
        "data.brightness": 0.4, "data.contrast": 0.4, "data.saturation": 0.4, "data.hue": 0.0, "data.jitter_prob": 1.0,
        "data.crop": "rrc", "data.mean": (0.485, 0.456, 0.406), "data.hflip": 0.5, "teacher": "",
    }  # fmt: skip
    assert {path: values[path] for path in expected} == expected
    assert registry.load(f"vit_{name}_dtm").optim.peak_lr == pytest.approx(1.5e-3 * 0.5**0.5, rel=1e-15)


def test_the_papers_learning_rate_is_a_recipe():
    assert registry.load("vit_b_dtm_paper_lr").optim.peak_lr == 1.5e-4


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("objective.num_masked=300", "objective.num_masked=300: an image has 196 patches"),
        ("model.architecture=vit", "model.init_values=0.1"),
        ("objective.beta=0", "must be positive"),
    ],
)
def test_impossible_settings(override, fragment):
    with pytest.raises(ValueError, match=fragment.replace("(", r"\(")):
        apply_overrides(registry.load("vit_b_dtm"), [override])


def test_methods_and_architectures_must_match():
    with pytest.raises(ValueError, match="model.architecture=beit: this objective trains the architecture vit"):
        apply_overrides(registry.load("vit_b_mae"), ["model.architecture=beit"])
    with pytest.raises(ValueError, match="teacher=x: this objective has no frozen teacher"):
        apply_overrides(registry.load("vit_b_mae"), ["teacher=x"])
