"""Reach of attention, spectrum of features, class activation maps: against cases that one can do by hand."""

from __future__ import annotations

import math

import pytest
import torch

from engine.analyses.attention import attention_maps, average_attention_distance, patch_distances
from engine.analyses.gradcam import class_activation_map, min_max
from engine.analyses.spectrum import covariance_spectrum, effective_rank, log_spectrum
from engine.models.build import build_encoder
from engine.models.classifier import build_classifier
from recipes.schema import Model

VIT = Model(embed_dim=32, depth=2, num_heads=2, patch_size=8)
BEIT = Model(architecture="beit", embed_dim=32, depth=2, num_heads=2, patch_size=8)


def test_distances_are_in_pixels():
    distances = patch_distances(3, 16)
    assert distances.shape == (9, 9) and torch.equal(distances, distances.T) and not distances.diagonal().any()
    assert distances[0, 1] == 16 and distances[0, 3] == 16 and distances[0, 8] == pytest.approx(32 * math.sqrt(2))


def test_average_distance_of_known_attention():
    """Heads that look at themselves, at everything alike, and at the class token alone."""
    distances = patch_distances(4, 8)
    itself, everything, half = torch.eye(17), torch.full((17, 17), 1 / 17), torch.zeros(17, 17)
    half[:, 0], half[:, 6] = 0.5, 0.5  # patch 5
    attention = torch.stack([itself, everything, half]).expand(2, -1, -1, -1)
    found = average_attention_distance(attention, distances)
    torch.testing.assert_close(found, torch.stack([distances[0, 0], distances.mean(), distances[:, 5].mean()]))
    raw = average_attention_distance(attention, distances, renormalize=False)
    torch.testing.assert_close(raw, found * torch.tensor([1, 16 / 17, 0.5]))


@pytest.mark.parametrize("model", [VIT, BEIT], ids=["vit", "beit"])
def test_attention_maps_are_those_of_the_network(model):
    """Rows add up to 1, the network computes what it did, and nothing is left behind in it."""
    torch.manual_seed(0)
    network = build_classifier(model, 32, num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    before = network(images)
    maps = attention_maps(network, images)
    assert maps.shape == (2, 2, 2, 17, 17) and not maps.requires_grad
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 2, 17))
    assert torch.equal(network(images), before)
    for block in network.blocks:
        assert block.attn.fused_attn and not block.attn.attn_drop._forward_pre_hooks
    values = {}
    block = network.blocks[1].attn
    block.qkv.register_forward_hook(lambda module, inputs, output: values.update(v=output.clone()))
    block.proj.register_forward_pre_hook(lambda module, inputs: values.update(mixed=inputs[0]))
    network(images)
    v = values["v"].unflatten(2, (3, 2, 16))[:, :, 2].transpose(1, 2)
    torch.testing.assert_close((maps[1] @ v).transpose(1, 2).flatten(2), values["mixed"], rtol=1e-4, atol=1e-5)


def test_maps_of_a_pretrained_encoder():
    """Our own encoders, whose forward is not timm's."""
    for model in (VIT, BEIT):
        maps = attention_maps(build_encoder(model, 32).eval(), torch.randn(1, 3, 32, 32))
        torch.testing.assert_close(maps.sum(-1), torch.ones(2, 1, 2, 17))


def test_spectrum_of_known_features():
    """Three independent directions of known variance, moved and turned, which changes nothing."""
    scales = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).double() * scales
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    spectrum = covariance_spectrum(corners @ turn + 5)
    torch.testing.assert_close(spectrum, scales**2)
    torch.testing.assert_close(log_spectrum(spectrum), 2 * scales.log())
    assert log_spectrum(torch.zeros(1)).isfinite().all()
    with pytest.raises(ValueError, match=r"features \(1, 3\): a matrix of 2 rows"):
        covariance_spectrum(torch.ones(1, 3))


def test_effective_rank_counts_directions():
    assert effective_rank(torch.tensor([4.0, 0, 0])).item() == pytest.approx(1)
    assert effective_rank(torch.full((7,), 0.3)).item() == pytest.approx(7)
    assert 1 < effective_rank(torch.tensor([4.0, 1.0])).item() < 2


def test_activation_map_by_hand():
    """One channel speaks for the class, one against it."""
    activations = torch.zeros(1, 4, 2)
    activations[0, 1, 0], activations[0, 2, 1], activations[0, 3] = 2, 3, torch.tensor([5.0, 1.0])
    gradients = torch.tensor([1.0, -2.0]).expand(1, 4, 2).clone()
    gradients[0, 0] += 4  # the weights are means over the patches: 2 and -1
    cam = class_activation_map(activations, gradients)
    torch.testing.assert_close(cam, torch.tensor([[[0.0, 4.0], [0.0, 9.0]]]))
    torch.testing.assert_close(min_max(cam), cam / 9)
    assert (min_max(torch.full((1, 2, 2), 3.0)) == 0).all()
    with pytest.raises(ValueError, match="patches of a square grid"):
        class_activation_map(torch.ones(1, 5, 2), torch.ones(1, 5, 2))
