"""What LUT's settings exchange, against the same written out in plain loops; and that no setting is ignored."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import lut_by_hand
import pytest
import torch
from tiny_lut import NUM_PATCHES, batch_of, outcome, tiny_lut

from engine.masks import disjoint_masks
from engine.models.heads import RankBatchNorm, projection_head
from engine.objectives.contract import AVERAGE
from engine.objectives.contrast import contextual_loss
from recipes.methods import Lut
from shards.draws.augmentations import mask_noise

# --- against plain loops --------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "low mask ratio": dict(mask_ratio=0.4),
    "one-directional": dict(symmetric=False),
    "class tokens": dict(bc_tokens="cls"),
    "token by token": dict(bc_tokens="tokenwise"),
    "token by token, low mask ratio": dict(bc_tokens="tokenwise", mask_ratio=0.4),
    "token by token, one-directional, batch statistics": dict(
        bc_tokens="tokenwise", symmetric=False, teacher_bn="batch"
    ),
    "pooled and token by token": dict(bc_tokens="pooled_tokenwise"),
    "masked": dict(bc_tokens="masked", teacher_bn="batch"),
    "masked, low mask ratio": dict(bc_tokens="masked", head_norm="ln", mask_ratio=0.4),
    "masked, one-directional": dict(bc_tokens="masked", head_norm="none", symmetric=False),
    "InfoNCE": dict(bc_loss="infonce"),
    "InfoNCE, token by token": dict(bc_loss="infonce", bc_temperature=0.5, bc_tokens="tokenwise"),
    "smooth L1": dict(bc_loss="smooth_l1"),
    "masked teacher": dict(teacher_mask_ratio=0.5),
    "masked teacher, class tokens": dict(teacher_mask_ratio=0.75, bc_tokens="cls", symmetric=False),
    "batch statistics": dict(teacher_bn="batch"),
    "layer norm and GELU": dict(head_norm="ln", head_act="gelu"),
    "no projector": dict(head_depth=0),
    "no predictor": dict(predictor_depth=0),
}


@pytest.mark.parametrize("settings", OPTIONS.values(), ids=list(OPTIONS))
def test_contextual_loss_and_gradients_are_those_of_plain_loops(settings: dict[str, Any]) -> None:
    objective = tiny_lut(**settings).double()
    objective.outside[AVERAGE].double()
    batch = batch_of(num_noise=objective.masks.num_noise, dtype=torch.float64)
    ours, theirs = objective(batch, 0)["bc"], lut_by_hand.contextual_loss(objective, batch)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    gradients = [torch.autograd.grad(loss, trained, allow_unused=True) for loss in (ours, theirs)]
    reached = 0
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
            reached += one.abs().max().item() > 0
    assert reached >= 20


@pytest.mark.parametrize("settings", OPTIONS.values(), ids=list(OPTIONS))
def test_losses_stay_in_fp32_under_autocast(settings: dict[str, Any]) -> None:
    objective = tiny_lut(**settings)
    batch = batch_of(num_noise=objective.masks.num_noise)
    exact = objective(batch, 0)["bc"]
    with torch.autocast("cpu", torch.bfloat16):
        metrics = objective(batch, 0)
    assert metrics["bc"].dtype == metrics["loss"].dtype == torch.float32
    assert metrics["bc"].item() == pytest.approx(exact.item(), rel=0.05)
    metrics["loss"].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.parameters())


# --- no setting is ignored ------------------------------------------------------------------------------------------

# Every field: another value, and what it needs beside it, if anything.
CHANGES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mask_ratio": (0.5, {}),
    "norm_pix_loss": (False, {}),
    "decoder_embed_dim": (32, {}),
    "decoder_depth": (2, {}),
    "decoder_num_heads": (4, {}),
    "w_mae": (0.5, {}),
    "w_bc": (0.5, {}),
    "symmetric": (False, {}),
    "bc_tokens": ("cls", {}),
    "bc_loss": ("infonce", {}),
    "bc_temperature": (0.1, {"bc_loss": "infonce"}),
    "teacher_mask_ratio": (0.5, {}),
    "teacher_bn": ("batch", {}),
    "head_depth": (1, {}),
    "predictor_depth": (3, {}),
    "head_hidden": (40, {}),
    "head_norm": ("ln", {}),
    "head_act": ("gelu", {}),
}
ELSEWHERE = {"momentum", "norm_batch"}  # on the average, below, and on the start-up lines, test_lut_recipes.py


def test_the_table_has_every_field() -> None:
    assert CHANGES.keys() | ELSEWHERE == {field.name for field in dataclasses.fields(Lut)}


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_changes_the_loss(name: str) -> None:
    value, beside = CHANGES[name]
    losses = []
    for settings in (beside, beside | {name: value}):
        objective = tiny_lut(**settings)
        losses.append(outcome(objective, batch_of(num_noise=objective.masks.num_noise))[0].item())
    assert getattr(Lut(), name) != value and abs(losses[0] - losses[1]) > 1e-4, losses


def test_every_kind_of_token_and_distance_is_another() -> None:
    values = [
        tiny_lut(bc_tokens=tokens, bc_loss=loss, teacher_bn="batch")(batch_of(), 0)["bc"].item()
        for tokens in ("pooled", "cls", "tokenwise", "pooled_tokenwise", "masked")
        for loss in ("l2norm", "infonce", "smooth_l1")
    ]
    assert len({round(value, 4) for value in values}) == 15, values


def test_momentum_moves_the_average_by_the_rest() -> None:
    for momentum in (0.9, 0.5):
        objective = tiny_lut(momentum=momentum)
        average, before = objective.outside[AVERAGE], {}
        for key, value in objective.outside_state().items():
            before[key] = value.clone()
        objective.after_step(0, 100)
        for part in ("encoder", "head"):
            student = getattr(objective, part).state_dict()
            for name, value in average[part].state_dict().items():
                if name not in ("pos_embed",) and value.is_floating_point():
                    old = before[f"average.{part}.{name}"]
                    torch.testing.assert_close(value, momentum * old + (1 - momentum) * student[name])


# --- heads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "names"),
    [("bn", {"0", "1", "3", "4", "6"}), ("ln", {"0", "1", "3", "4", "6"}), ("none", {"0", "2", "4"})],
)
def test_layers_of_a_head_have_the_released_numbers(norm: str, names: set[str]) -> None:
    """Linear, norm, activation, Linear; without a norm the numbers close up."""
    for act, kind in (("relu", torch.nn.ReLU), ("gelu", torch.nn.GELU)):
        head = projection_head(6, hidden=10, depth=3, norm=norm, act=act)
        assert {key.partition(".")[0] for key in head.state_dict()} == names
        assert sum(isinstance(layer, kind) for layer in head) == 2
        norms = [layer for layer in head if isinstance(layer, RankBatchNorm | torch.nn.LayerNorm)]
        assert [layer.eps for layer in norms] == {"bn": [1e-5] * 2, "ln": [1e-6] * 2, "none": []}[norm]
        assert head(torch.randn(4, 6)).shape == (4, 6)


@pytest.mark.parametrize(("head", "predictor"), [(0, 2), (1, 3), (2, 0), (3, 1)])
def test_depths_are_counted_in_linear_layers(head: int, predictor: int) -> None:
    objective = tiny_lut(head_depth=head, predictor_depth=predictor)
    for part, depth in ((objective.head, head), (objective.predictor, predictor)):
        assert sum(isinstance(layer, torch.nn.Linear) for layer in part) == depth
    outcome(objective, batch_of())
    objective.after_step(0, 10)  # also where the average has no projector


# --- one direction --------------------------------------------------------------------------------------------------


def images_per_call(objective: torch.nn.Module, batch: Any) -> dict[str, list[int]]:
    """How many images each network is called with in one step."""
    calls: dict[str, list[int]] = {"student": [], "teacher": [], "decoder": []}
    average = objective.outside[AVERAGE]
    for name, part in (("student", objective.encoder), ("teacher", average["encoder"]), ("decoder", objective.decoder)):
        part.register_forward_pre_hook(lambda module, inputs, name=name: calls[name].append(len(inputs[0])))
    objective(batch, 0)
    return calls


def test_networks_run_no_more_than_they_must() -> None:
    """Both views in one call; one-directional: the student never sees the strong view, the teacher never the clean."""
    assert images_per_call(tiny_lut(), batch_of(5)) == {"student": [10], "teacher": [10], "decoder": [5]}
    one_way = images_per_call(tiny_lut(symmetric=False), batch_of(5))
    assert one_way == {"student": [5], "teacher": [5], "decoder": [5]}
    masked = images_per_call(tiny_lut(bc_tokens="masked", head_norm="ln"), batch_of(5))
    assert masked == {"student": [10], "teacher": [10], "decoder": [5, 5]}


def test_one_direction_is_clean_to_strong() -> None:
    objective, batch = tiny_lut(symmetric=False), batch_of()
    clean, strong = batch.views
    other = torch.randn(clean.shape, generator=torch.Generator().manual_seed(9))
    (target,) = objective.targets(clean, strong, batch.noise)
    torch.testing.assert_close(objective.targets(other, strong, batch.noise)[0], target, rtol=0, atol=0)
    assert not torch.equal(objective.targets(clean, other, batch.noise)[0], target)
    (prediction,), mae = objective.predictions(clean, strong, batch.noise)
    (same,), same_mae = objective.predictions(clean, other, batch.noise)
    torch.testing.assert_close(prediction, same, rtol=0, atol=1e-5)  # batch norm sums about a mean that has moved
    assert mae == same_mae
    both = tiny_lut()
    symmetric, _ = both.predictions(clean, strong, batch.noise)
    torch.testing.assert_close(symmetric[0], prediction)


# --- the teacher ----------------------------------------------------------------------------------------------------


def test_target_masking_leaves_the_students_masks_alone() -> None:
    """Twice as many numbers are drawn; the first N are those that are drawn without it."""
    plain, hidden = tiny_lut(), tiny_lut(teacher_mask_ratio=0.5)
    assert (plain.masks.num_noise, hidden.masks.num_noise) == (NUM_PATCHES, 2 * NUM_PATCHES)
    ids = torch.arange(6).numpy()
    few, many = (torch.from_numpy(o.masks.drawn(3, 2, ids)["noise"]) for o in (plain, hidden))
    assert torch.equal(many[:, :NUM_PATCHES], few)
    assert torch.equal(few, torch.from_numpy(mask_noise(3, 2, ids, NUM_PATCHES)))
    for one, other in zip(plain.student_masks(few), hidden.student_masks(many), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    views = batch_of(6).views
    predictions = [objective.predictions(*views, noise)[0] for objective, noise in ((plain, few), (hidden, many))]
    assert all(torch.equal(a, b) for a, b in zip(*predictions, strict=True))


@pytest.mark.parametrize(("share", "left"), [(0.25, 12), (0.5, 8), (0.9, 1)])
def test_the_teacher_sees_what_is_left(share: float, left: int) -> None:
    """The patches with the smallest numbers of its own noise, and no pixel of the others."""
    objective, batch = tiny_lut(teacher_mask_ratio=share), batch_of(num_noise=2 * NUM_PATCHES)
    targets = objective.targets(*batch.views, batch.noise)
    hidden = batch.noise[:, NUM_PATCHES:].argsort(1)[:, left:]
    changed = tuple(view.clone() for view in batch.views)
    for row, places in enumerate(hidden.tolist()):
        for top, side in (divmod(place, 4) for place in places):
            for view in changed:
                view[row, :, top * 8 : top * 8 + 8, side * 8 : side * 8 + 8] += 1
    for one, other in zip(targets, objective.targets(*changed, batch.noise), strict=True):
        assert torch.equal(one, other)
    changed[0][:] += 1
    assert not torch.equal(objective.targets(*changed, batch.noise)[0], targets[0])


def test_batch_statistics_move_no_running_ones() -> None:
    objective, batch = tiny_lut(teacher_bn="batch"), batch_of()
    before = {name: value.clone() for name, value in objective.outside_state().items()}
    objective(batch, 0)
    assert all(torch.equal(value, before[name]) for name, value in objective.outside_state().items())
    student = {name: value.clone() for name, value in objective.head.state_dict().items()}
    objective.after_step(0, 10)
    for name in ("1.running_mean", "1.running_var"):
        expected = before[f"average.head.{name}"].lerp(student[name], 1 - 0.996)
        torch.testing.assert_close(objective.outside_state()[f"average.head.{name}"], expected)


def test_batch_norm_by_its_batch_in_evaluation() -> None:
    ours, theirs = RankBatchNorm(5).eval(), torch.nn.BatchNorm1d(5, track_running_stats=False).eval()
    x = 3 + 2 * torch.randn(9, 5)
    assert not torch.allclose(ours(x), theirs(x), atol=0.1)
    ours.eval_by_batch = True
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.num_batches_tracked == 0 and torch.equal(ours.running_mean, torch.zeros(5))


# --- masks and distances --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask_ratio", [0.75, 0.5, 0.4, 0.1])
def test_each_mask_puts_its_own_patches_first(mask_ratio: float) -> None:
    """So that a decoder restores the order of either view."""
    for masking in disjoint_masks(torch.rand(3, 10), mask_ratio):
        for row in range(3):
            keeps = masking.ids_keep[row].tolist()
            assert [masking.ids_restore[row, place].item() for place in keeps] == list(range(len(keeps)))
            assert sorted(masking.ids_restore[row].tolist()) == list(range(10))
            assert set(masking.mask[row].nonzero().flatten().tolist()) == set(range(10)) - set(keeps)


def test_smooth_l1_is_half_the_squared_distance_while_channels_are_near() -> None:
    """What beta 1 means at length 1: a channel must differ by more than 1 to matter."""
    a, b = torch.randn(6, 40), torch.randn(6, 40)
    near = contextual_loss(a, b, kind="smooth_l1")
    torch.testing.assert_close(near, contextual_loss(a, b) / 2)
    far = contextual_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0]]), kind="smooth_l1")
    assert far.item() == pytest.approx(1.5)


def test_infonce_of_two_ranks_is_that_of_one(tmp_path: Path) -> None:
    """Two processes with half the rows each: mean loss and gradients of the whole on one."""
    torch.manual_seed(0)
    rows = torch.randn(10, 7, dtype=torch.float64), torch.randn(10, 7, dtype=torch.float64)
    torch.save(rows, tmp_path / "rows.pt")
    worker = [sys.executable, str(Path(__file__).with_name("contrast_worker.py")), str(tmp_path)]
    processes = [subprocess.Popen([*worker, str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    queries = rows[0].clone().requires_grad_()
    whole = contextual_loss(queries, rows[1], kind="infonce", temperature=0.3)
    whole.backward()
    losses, gradients = zip(*(torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)), strict=True)
    torch.testing.assert_close(sum(losses) / 2, whole.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(gradients) / 2, queries.grad, rtol=0, atol=1e-12)
    half = contextual_loss(rows[0][:5], rows[1][:5], kind="infonce", temperature=0.3)
    assert abs(losses[0] - half).item() > 0.1  # among the negatives of one rank alone it is another loss
