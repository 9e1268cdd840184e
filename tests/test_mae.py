"""MAE: the properties of its mask, its loss and its initial weights. Its numbers: test_golden.py."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden_files import read, state
from golden_weights import place_whole
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.masks import gather_tokens, random_mask
from engine.models.patches import patchify
from engine.models.positions import sincos_positions
from engine.objectives.mae import MaskedAutoencoder
from recipes.methods import Mae
from recipes.schema import Data, Model

TINY = Model(embed_dim=32, depth=2, num_heads=2, patch_size=8)
TINY_MAE = Mae(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)


@pytest.fixture(scope="module")
def core():
    return read("mae_core.npz")


@pytest.fixture(scope="module")
def released(core) -> MaskedAutoencoder:
    """Our module with the released program's weights, in float64."""
    objective = MaskedAutoencoder(TINY_MAE, TINY, 32).double()
    place_whole(objective, state(core, "s/"))
    return objective


def tensor(array) -> torch.Tensor:
    return torch.from_numpy(np.asarray(array)).double()


def test_encoder_with_all_patches_is_the_plain_transformer(released, core):
    """Seeing every patch in order is the same as timm's own forward."""
    images = tensor(core["imgs"])
    everything = torch.arange(16).expand(len(images), -1)
    torch.testing.assert_close(released.encoder(images, everything), released.encoder(images), rtol=0, atol=1e-12)


def test_loss_without_pixel_normalisation():
    torch.manual_seed(0)
    objective = MaskedAutoencoder(Mae(norm_pix_loss=False, **decoder_of(TINY_MAE)), TINY, 32)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    pred, masking = objective.reconstruct(images, noise)
    error = ((pred - patchify(images, 8)) ** 2).mean(-1)
    expected = error[masking.mask].mean()
    torch.testing.assert_close(objective(SimpleNamespace(views=(images,), noise=noise), 0)["loss"], expected)


def test_masked_patches_are_predicted_alone():
    """The same predictions as those of all patches, in the order of their places in the shuffled sequence."""
    torch.manual_seed(0)
    objective = MaskedAutoencoder(TINY_MAE, TINY, 32)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    every, masking = objective.reconstruct(images, noise)
    masked, _ = objective.reconstruct(images, noise, masked_only=True)
    ids = masking.ids_masked
    assert torch.equal(ids, noise.argsort(1)[:, 4:]) and masked.shape[:2] == (2, 12)
    torch.testing.assert_close(masked, gather_tokens(every, ids))


def test_gradients_under_autocast_are_those_of_exact_arithmetic():
    """To the rounding of bf16, of every weight: what the decoder's blocks add up stays fp32, as in its norms."""
    torch.manual_seed(0)
    objective = MaskedAutoencoder(dataclasses.replace(TINY_MAE, decoder_depth=3), TINY, 64)
    exact = copy.deepcopy(objective).double()
    images, noise = torch.randn(8, 3, 64, 64), torch.rand(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(SimpleNamespace(views=(images,), noise=noise), 0)["loss"]
    loss.backward()
    exact(SimpleNamespace(views=(images.double(),), noise=noise), 0)["loss"].backward()
    expected = {name: parameter.grad for name, parameter in exact.named_parameters() if parameter.requires_grad}
    for name, gradient in expected.items():
        found = objective.get_parameter(name).grad
        assert (found - gradient).norm() < 0.04 * gradient.norm(), name


# Every field of Mae and another value of it.
CHANGES = {
    "mask_ratio": 0.5,
    "norm_pix_loss": False,
    "decoder_embed_dim": 16,
    "decoder_depth": 2,
    "decoder_num_heads": 4,
}


def test_no_field_is_ignored():
    """Each changes the loss; the shapes of the decoder are those that were asked for."""
    assert CHANGES.keys() == {field.name for field in dataclasses.fields(Mae)}

    def loss(settings: Mae) -> float:
        torch.manual_seed(0)
        objective = MaskedAutoencoder(settings, TINY, 32)
        assert objective.decoder.embed.out_features == settings.decoder_embed_dim
        assert len(objective.decoder.blocks) == settings.decoder_depth
        assert all(block.attn.num_heads == settings.decoder_num_heads for block in objective.decoder.blocks)
        generator = torch.Generator().manual_seed(1)
        images, noise = torch.randn(3, 3, 32, 32, generator=generator), torch.rand(3, 16, generator=generator)
        return objective(SimpleNamespace(views=(images,), noise=noise), 0)["loss"].item()

    for name, value in CHANGES.items():
        assert getattr(TINY_MAE, name) != value
        assert abs(loss(dataclasses.replace(TINY_MAE, **{name: value})) - loss(TINY_MAE)) > 1e-4, name


@pytest.mark.parametrize("num_patches", [1, 16])
def test_a_mask_that_hides_all_or_nothing_is_refused(num_patches):
    model = Model(embed_dim=32, depth=1, num_heads=2, patch_size=8)
    data = Data(image_size=8 * round(num_patches**0.5))
    for mask_ratio, fragment in ((0.99, "leaves none"), (1e-17, "hides none")):
        with pytest.raises(
            ValueError, match=rf"objective.mask_ratio={mask_ratio}: {fragment} of {num_patches} patches"
        ):
            Mae(mask_ratio=mask_ratio).check(model, data, "fp32")


def decoder_of(settings: Mae) -> dict:
    return {name: getattr(settings, name) for name in ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")}


def test_only_visible_pixels_reach_the_encoder(released, core):
    """Changing a masked pixel changes the target, not the features."""
    images, noise = tensor(core["imgs"]), tensor(core["noise"])
    masking = random_mask(noise, 0.75)
    hidden = masking.mask[0].nonzero()[0].item()
    changed = images.clone()
    row, column = divmod(hidden, 4)
    changed[0, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8] += 1
    assert (released.encoder(changed, masking.ids_keep) == released.encoder(images, masking.ids_keep)).all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 0.99), st.integers(0, 2**31))
def test_a_mask_is_a_partition(num_patches, mask_ratio, seed):
    noise = torch.rand(3, num_patches, generator=torch.Generator().manual_seed(seed))
    mask = random_mask(noise, mask_ratio)
    num_keep = int(num_patches * (1 - mask_ratio))
    assert ((~mask.mask).sum(1) == num_keep).all()
    for row in range(3):
        assert set(mask.ids_keep[row].tolist()) == set((~mask.mask[row]).nonzero().flatten().tolist())
        assert sorted(mask.ids_restore[row].tolist()) == list(range(num_patches))


def test_initial_weights():
    """Fixed positions, standard deviations as in the released programs, and no gradient for the tables."""
    torch.manual_seed(0)
    objective = MaskedAutoencoder(Mae(decoder_depth=1), Model(embed_dim=384, depth=1, num_heads=6), 224)
    assert not objective.encoder.pos_embed.requires_grad and not objective.decoder.pos_embed.requires_grad
    torch.testing.assert_close(objective.encoder.pos_embed.data, sincos_positions(384, 14))
    assert objective.encoder.cls_token.std().item() == pytest.approx(0.02, rel=0.15)
    qkv = objective.encoder.blocks[0].attn.qkv
    bound = (6 / (384 + 3 * 384)) ** 0.5
    assert qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.01) and (qkv.bias == 0).all()
    patch = objective.encoder.patch_embed.proj
    assert patch.weight.abs().max().item() == pytest.approx((6 / (384 + 768)) ** 0.5, rel=0.01)
    assert 0 < patch.bias.abs().max().item() <= 768**-0.5


@pytest.mark.parametrize(("name", "count"), [("VIT_S", 21_665_664), ("VIT_B", 85_798_656), ("VIT_L", 303_301_632)])
def test_number_of_parameters(name, count):
    """Encoder and decoder sizes counted on the released programs."""
    from engine.models.encoders import MaskedVisionTransformer
    from recipes import sizes

    model = getattr(sizes, name)
    total = sum(p.numel() for p in MaskedVisionTransformer(model, 224).parameters())
    assert total == count
