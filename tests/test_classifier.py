"""Classifiers for fine-tuning, and what a pre-trained encoder gives them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from engine.models.build import build_encoder, timm_model
from engine.models.classifier import build_classifier
from engine.models.transfer import SHARED_TABLE, interpolate_positions, merged_tables, transfer_encoder
from recipes.schema import Model

# isort: split
import timm

VIT = Model(embed_dim=32, depth=3, num_heads=2, patch_size=8)
BEIT = Model(architecture="beit", embed_dim=32, depth=3, num_heads=2, patch_size=8, init_values=0.1)
BLOCK_TABLES = [f"blocks.{block}.attn.relative_position_bias_table" for block in range(3)]
PER_BLOCK = dataclasses.replace(BEIT, shared_rel_pos_bias=False)


def images(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def classifier(model: Model, pooling: str = "avg", image_size: int = 32) -> nn.Module:
    torch.manual_seed(1)
    return build_classifier(model, image_size, num_classes=5, global_pool=pooling).eval()


def encoder(model: Model) -> nn.Module:
    """A pre-trained one: nothing is zero or one by initialisation."""
    torch.manual_seed(2)
    network = build_encoder(model, 32).eval()
    for parameter in network.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return network


# --- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["avg", "token"])
@pytest.mark.parametrize("model", [VIT, PER_BLOCK], ids=["vit", "beit"])
def test_weights_are_timms(model, pooling):
    name, arguments = timm_model(model, 32)
    ours = classifier(model, pooling)
    theirs = timm.create_model(name, **arguments | {"num_classes": 5, "global_pool": pooling}).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    torch.testing.assert_close(ours(images()), theirs(images()))


@pytest.mark.parametrize("model", [VIT, BEIT], ids=["vit", "beit"])
def test_what_is_pooled(model):
    """The mean of the patches goes through a norm of its own; the class token has been through the last norm."""
    averaging, by_token = classifier(model, "avg"), classifier(model, "token")
    tokens = averaging.forward_features(images())
    expected = averaging.head(averaging.fc_norm(tokens[:, 1:].mean(1)))
    torch.testing.assert_close(averaging(images()), expected)
    assert isinstance(averaging.norm, nn.Identity) and not isinstance(averaging.fc_norm, nn.Identity)
    torch.testing.assert_close(by_token(images()), by_token.head(by_token.forward_features(images())[:, 0]))
    assert isinstance(by_token.fc_norm, nn.Identity) and not isinstance(by_token.norm, nn.Identity)


def test_a_fresh_head_says_nothing_yet():
    """Small enough that all classes begin alike; 2e-5 in MAE's program, 0.02 x 0.001 in BEiT's."""
    for model in (VIT, BEIT):
        network = build_classifier(dataclasses.replace(model, embed_dim=256), 32, num_classes=200)
        assert network.head.weight.std().item() == pytest.approx(2e-5, rel=0.1)
        assert not network.head.bias.any()


def test_everything_is_trained_and_blocks_share_no_table():
    for model in (VIT, BEIT, dataclasses.replace(BEIT, abs_pos_emb=True)):
        names = {name for name, parameter in classifier(model).named_parameters() if parameter.requires_grad}
        assert names == {name for name, _ in classifier(model).named_parameters()}
        assert ("pos_embed" in names) == (model.architecture == "vit" or model.abs_pos_emb)
        assert (set(BLOCK_TABLES) <= names) == (model.architecture == "beit") and SHARED_TABLE not in names
    only_absolute = dataclasses.replace(BEIT, rel_pos_bias=False, shared_rel_pos_bias=False, abs_pos_emb=True)
    assert not set(BLOCK_TABLES) & classifier(only_absolute).state_dict().keys()


@pytest.mark.parametrize("model", [VIT, BEIT], ids=["vit", "beit"])
def test_drop_path_grows_from_the_first_block(model):
    network = build_classifier(dataclasses.replace(model, drop_path=0.2), 32, num_classes=5)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in network.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])


def test_impossible_classifiers_are_refused():
    with pytest.raises(ValueError, match="global_pool=max: one of avg, token"):
        build_classifier(VIT, 32, num_classes=5, global_pool="max")
    with pytest.raises(ValueError, match="num_classes=0: at least 1"):
        build_classifier(VIT, 32, num_classes=0)


# --- the weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [VIT, BEIT], ids=["vit", "beit"])
def test_a_classifier_sees_what_its_encoder_saw(model):
    """By the class token the last norm comes along, and with both tables added up no attention changes."""
    source, network = encoder(model), classifier(model, "token")
    transfer = transfer_encoder(network, source.state_dict())
    torch.testing.assert_close(network.forward_features(images()), source(images()), rtol=1e-4, atol=1e-5)
    assert transfer.fresh == ("head.weight", "head.bias") and transfer.unused == ()


@pytest.mark.parametrize("model", [VIT, BEIT], ids=["vit", "beit"])
def test_the_last_norm_is_left_behind_where_patches_are_averaged(model):
    network = classifier(model)
    before = network.head.weight.clone()
    transfer = transfer_encoder(network, encoder(model).state_dict())
    assert set(transfer.fresh) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert set(transfer.unused) == {"norm.weight", "norm.bias"} and torch.equal(network.head.weight, before)


@pytest.mark.parametrize("tables", ["both", "shared", "block"])
@pytest.mark.parametrize(("own", "shared"), [(True, True), (True, False), (False, True)])
def test_tables_are_merged(tables, own, shared):
    source = encoder(dataclasses.replace(BEIT, rel_pos_bias=own, shared_rel_pos_bias=shared)).state_dict()
    if (tables == "shared" and not shared) or (tables == "block" and not own):
        with pytest.raises(ValueError, match=f"tables={tables}: the encoder's blocks"):
            merged_tables(source, tables)
        return
    merged = merged_tables(source, tables)
    assert SHARED_TABLE not in merged
    for name in BLOCK_TABLES:
        parts = [source[name]] if own and tables != "shared" else []
        parts += [source[SHARED_TABLE]] if shared and tables != "block" else []
        assert torch.equal(merged[name], sum(parts))
    network = classifier(BEIT)
    transfer_encoder(network, source, tables=tables)
    assert torch.equal(network.state_dict()[BLOCK_TABLES[1]], merged[BLOCK_TABLES[1]])


def test_blocks_do_not_share_memory_after_sharing_a_table():
    source = encoder(dataclasses.replace(BEIT, rel_pos_bias=False)).state_dict()
    merged = merged_tables(source)
    merged[BLOCK_TABLES[0]].zero_()
    assert merged[BLOCK_TABLES[1]].any() and source[SHARED_TABLE].any()


def test_what_has_no_relative_positions_is_left_alone():
    source = encoder(VIT).state_dict()
    assert merged_tables(source) == source
    with pytest.raises(ValueError, match="tables=all: one of both, shared, block"):
        merged_tables(source, "all")


def test_positions_for_another_image_size():
    """A ViT's table and BEiT's both kinds; all else comes over as it is."""
    absolute = dataclasses.replace(BEIT, abs_pos_emb=True)
    for model in (VIT, absolute):
        source, network = encoder(model).state_dict(), classifier(model, image_size=48)
        transfer_encoder(network, source)
        weights = network.state_dict()
        torch.testing.assert_close(weights["pos_embed"], interpolate_positions(source["pos_embed"], 6))
        assert torch.equal(weights["cls_token"], source["cls_token"])
    tables, merged = weights[BLOCK_TABLES[0]], merged_tables(source)[BLOCK_TABLES[0]]
    assert tables.shape == (11 * 11 + 3, 2) and torch.equal(tables[-3:], merged[-3:])  # the class token's three stay
    grid, old = tables[:-3].view(11, 11, 2), merged[:-3].view(7, 7, 2)
    torch.testing.assert_close(grid[[0, 0, 5, 10], [0, 10, 5, 10]], old[[0, 0, 3, 6], [0, 6, 3, 6]])  # corners, centre


def test_interpolated_positions():
    """The class token's row stays; a ramp stays a ramp; the same grid is not touched."""
    ramp = torch.arange(8.0)[:, None, None].expand(8, 8, 2).reshape(1, 64, 2)
    table = torch.cat([torch.full((1, 1, 2), 9.0), ramp], 1)
    assert interpolate_positions(table, 8) is table
    larger = interpolate_positions(table, 16)
    assert larger.shape == (1, 257, 2) and (larger[:, 0] == 9).all()
    rows = larger[0, 1:, 0].view(16, 16)
    torch.testing.assert_close(rows[5:11, 3], torch.arange(5, 11) / 2 - 0.25, rtol=0, atol=0.05)  # not at the edge
    assert (rows == rows[:, :1]).all() and (rows.diff(dim=0) > 0).all()
    with pytest.raises(ValueError, match="63 patches are no square grid"):
        interpolate_positions(table[:, :-1], 16)


def test_an_encoder_in_pieces_or_of_another_size_is_refused():
    source = encoder(VIT).state_dict()
    network = classifier(VIT)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    short = {name: value for name, value in source.items() if name != "blocks.1.attn.qkv.weight"}
    with pytest.raises(ValueError, match=r"1 weights are missing \(blocks.1.attn.qkv.weight\)"):
        transfer_encoder(network, short)
    wide = source | {"blocks.1.mlp.fc1.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"blocks.1.mlp.fc1.bias is \(7,\) and must be \(128,\)"):
        transfer_encoder(network, wide)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
