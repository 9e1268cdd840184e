"""The pictures of what MAE paints: what was visible stays, what was hidden is gray and then predicted."""

from __future__ import annotations

import pytest
import torch

from engine.analyses.morphs import morph_map
from engine.analyses.reconstructions import GRAY, reconstructions
from engine.masks import random_mask
from engine.models.patches import patchify
from engine.morphing import group_tokens
from engine.objectives.mae import MaskedAutoencoder, normalize_patches
from recipes.methods import Mae
from recipes.schema import Model

SIZE, PATCH, IMAGES = 32, 8, 3
MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.25, 0.2, 0.3])


def objective(norm_pix_loss: bool) -> MaskedAutoencoder:
    torch.manual_seed(0)
    settings = Mae(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, norm_pix_loss=norm_pix_loss)
    return MaskedAutoencoder(settings, Model(embed_dim=32, depth=1, num_heads=2, patch_size=PATCH), SIZE).eval()


@pytest.fixture
def pictures() -> torch.Tensor:
    """Pixels in [0.2, 0.8], far from where pictures are clipped."""
    draws = torch.rand(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return 0.2 + 0.6 * draws


@pytest.fixture
def noise() -> torch.Tensor:
    return torch.rand(IMAGES, (SIZE // PATCH) ** 2, generator=torch.Generator().manual_seed(2))


def normalized(pictures: torch.Tensor) -> torch.Tensor:
    return (pictures - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_visible_patches_stay_and_hidden_ones_are_gray(pictures, noise, norm_pix_loss):
    network = objective(norm_pix_loss)
    true, seen, painted = reconstructions(network, normalized(pictures), noise, MEAN, STD)
    assert true.shape == seen.shape == painted.shape == (IMAGES, 3, SIZE, SIZE)
    torch.testing.assert_close(true, pictures)
    mask = random_mask(noise, network.settings.mask_ratio).mask
    assert mask.sum() == 0.75 * mask.numel()
    true, seen, painted = (patchify(images, PATCH) for images in (true, seen, painted))
    assert torch.equal(seen[~mask], true[~mask]) and torch.equal(painted[~mask], true[~mask])
    torch.testing.assert_close(seen[mask], torch.full_like(seen[mask], GRAY))
    assert (painted[mask] != true[mask]).float().mean() > 0.9
    assert min(painted.min(), seen.min()) >= 0 and max(painted.max(), seen.max()) <= 1


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_prediction_gives_the_picture_back(pictures, noise, norm_pix_loss, monkeypatch):
    """With normalised targets it is brought back to brightness and contrast of the true patch; else it is pixels."""
    network = objective(norm_pix_loss)
    images = normalized(pictures)
    target = patchify(images, PATCH)
    target = normalize_patches(target) if norm_pix_loss else target
    masking = random_mask(noise, network.settings.mask_ratio)
    monkeypatch.setattr(network, "reconstruct", lambda images, noise: (target, masking))
    true, _, painted = reconstructions(network, images, noise, MEAN, STD)
    torch.testing.assert_close(painted, true)


def test_a_prediction_of_zero_is_each_patchs_mean_or_the_data_sets(pictures, noise, monkeypatch):
    for norm_pix_loss in (True, False):
        network = objective(norm_pix_loss)
        images = normalized(pictures)
        masking = random_mask(noise, network.settings.mask_ratio)
        zeros = torch.zeros_like(patchify(images, PATCH))
        monkeypatch.setattr(network, "reconstruct", lambda *_, given=(zeros, masking): given)
        painted = patchify(reconstructions(network, images, noise, MEAN, STD)[2], PATCH)
        colours = painted[masking.mask].unflatten(1, (PATCH**2, 3))
        level = patchify(images, PATCH)[masking.mask].mean(dim=1).view(-1, 1, 1) if norm_pix_loss else 0.0
        torch.testing.assert_close(colours, (level * STD + MEAN).expand_as(colours))


def test_a_morph_map_paints_every_patch_in_its_groups_mean_colour(pictures):
    targets = torch.randn(IMAGES, 16, 5, generator=torch.Generator().manual_seed(3))
    groups = group_tokens(targets, 9, 3)
    painted, colours = patchify(morph_map(groups, pictures, PATCH), PATCH), patchify(pictures, PATCH)
    for image in range(IMAGES):
        for label in groups.labels[image].unique():
            members = groups.labels[image] == label
            mean = colours[image, members].view(-1, 3).mean(dim=0)
            expected = mean.repeat(PATCH**2).expand(int(members.sum()), -1)
            torch.testing.assert_close(painted[image, members], expected, rtol=1e-4, atol=1e-5)
