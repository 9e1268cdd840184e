"""LUT's heads and moving average, and batch norm on one rank. Its numbers: test_golden.py."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_files import read, state
from golden_weights import place_whole

from engine.masks import disjoint_masks
from engine.models.heads import RankBatchNorm, projection_head
from engine.objectives.context_tokens import pooled
from engine.objectives.contrast import contextual_loss
from engine.objectives.lut import AVERAGE, ContextualAutoencoder
from recipes.methods import Lut
from recipes.schema import Model

TINY = Model(embed_dim=32, depth=2, num_heads=2, patch_size=8)


@pytest.fixture(scope="module")
def core() -> dict[str, np.ndarray]:
    return read("lut_core.npz")


@pytest.fixture
def released(core) -> ContextualAutoencoder:
    """Our module with the released program's student and teacher, in float64."""
    settings = Lut(
        decoder_embed_dim=32,
        decoder_depth=1,
        decoder_num_heads=2,
        head_hidden=64,
        w_mae=float(core["w_mae"]),
        w_bc=float(core["w_bc"]),
        mask_ratio=float(core["mask_ratio"]),
    )
    objective = ContextualAutoencoder(settings, TINY, 32).double()
    objective.outside[AVERAGE].double()
    place_whole(objective, state(core, "s/"), state(core, "t/"))
    return objective.train()


def batch(core) -> SimpleNamespace:
    images = (torch.from_numpy(core["imgs1"]).double(), torch.from_numpy(core["imgs2"]).double())
    return SimpleNamespace(views=images, noise=torch.from_numpy(core["noise"]))


def test_a_low_mask_ratio_leaves_fewer_patches_to_the_second_view():
    first, second = disjoint_masks(torch.rand(2, 10), 0.4)
    assert first.ids_keep.shape[1] == 6 and second.ids_keep.shape[1] == 4
    assert (first.mask ^ second.mask).all()


def test_a_step_moves_the_average_and_nothing_trains_it(core, released):
    trained = {id(p) for p in released.parameters()}
    outside = list(released.outside[AVERAGE].parameters())
    assert not trained & {id(p) for p in outside} and not any(p.requires_grad for p in outside)
    assert not any("average" in name for name in released.state_dict())
    released.train()
    assert not released.outside[AVERAGE].training
    before = [p.clone() for p in outside]
    released(batch(core), 0)["loss"].backward()
    assert all(p.grad is None for p in outside) and all(torch.equal(a, b) for a, b in zip(before, outside, strict=True))
    released.after_step(0, 100)
    assert any(not torch.equal(a, b) for a, b in zip(before, outside, strict=True))


def test_the_average_keeps_its_precision_when_the_student_is_cast():
    objective = ContextualAutoencoder(Lut(**small()), TINY, 32).bfloat16()
    assert objective.encoder.cls_token.dtype == torch.bfloat16
    assert {p.dtype for p in objective.outside[AVERAGE].parameters()} == {torch.float32}


def small() -> dict:
    return dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2, head_hidden=64)


def test_outside_state_comes_back():
    first, second = (ContextualAutoencoder(Lut(**small()), TINY, 32) for _ in range(2))
    second.load_outside_state(first.outside_state())
    for name, value in second.outside_state().items():
        assert torch.equal(value, first.outside_state()[name])
    with pytest.raises(RuntimeError, match="Missing key"):
        second.load_outside_state({})


def test_the_contextual_loss_trains_no_decoder_and_the_reconstruction_no_head(core, released):
    metrics = released(batch(core), 0)
    metrics["bc"].backward(retain_graph=True)
    assert all(p.grad is None or not p.grad.any() for p in released.decoder.parameters())
    assert released.head[0].weight.grad.any()
    released.zero_grad()
    metrics["mae"].backward()
    heads = (*released.head.parameters(), *released.predictor.parameters())
    assert all(p.grad is None or not p.grad.any() for p in heads)


def test_distance_is_two_minus_two_cosines():
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    expected = (2 - 2 * torch.cosine_similarity(a, b)).mean()
    torch.testing.assert_close(contextual_loss(a, b), expected)
    assert contextual_loss(a, 3 * a).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_head_depths(depth):
    head = projection_head(6, hidden=10, depth=depth)
    assert sum(isinstance(layer, torch.nn.Linear) for layer in head) == depth
    assert head(torch.randn(4, 6)).shape == (4, 6)
    assert not any(layer.bias is not None for layer in head if isinstance(layer, torch.nn.Linear))


def test_rank_batch_norm_on_one_rank_is_batch_norm():
    torch.manual_seed(0)
    ours, theirs = RankBatchNorm(5), torch.nn.BatchNorm1d(5)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for _ in range(3):
        x = 2 + torch.randn(8, 5)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        weights = torch.randn(8, 5)
        (ours(a) * weights).sum().backward()
        (theirs(b) * weights).sum().backward()
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_pooling_leaves_the_class_token_out():
    tokens = torch.randn(2, 5, 3)
    torch.testing.assert_close(pooled(tokens), tokens[:, 1:].sum(1) / 4)


def test_a_low_mask_ratio_trains_too():
    """Below one half the second view keeps fewer patches than the first."""
    objective = ContextualAutoencoder(Lut(mask_ratio=0.4, **small()), TINY, 32)
    images = (torch.randn(3, 3, 32, 32), torch.randn(3, 3, 32, 32))
    loss = objective(SimpleNamespace(views=images, noise=torch.rand(3, 16)), 0)["loss"]
    loss.backward()
    assert loss.isfinite()
