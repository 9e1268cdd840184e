"""The encoders' switches: BEiT's kinds of positions against timm's own forward and export, and stochastic depth."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from tiny_dtm import TINY, batch_of, tiny
from torch import Tensor

from engine.models.beit import MaskedBeit, beit_arguments
from engine.models.build import build_encoder
from engine.models.stochastic_depth import StochasticDepth
from engine.params import parameter_groups
from engine.weights.export import write_encoder
from recipes import registry
from recipes.overrides import apply_overrides
from recipes.schema import Model
from tools.benchmarks.operators import operators

# isort: split
import timm
from timm.layers import DropPath

SWITCHES = ("rel_pos_bias", "shared_rel_pos_bias", "abs_pos_emb")
KINDS = [dict(zip(SWITCHES, on, strict=True)) for on in product((True, False), repeat=3) if any(on)]
NAMES = ["+".join(name for name in SWITCHES if kinds[name]) for kinds in KINDS]


def encoder_with(kinds: dict[str, bool], **changes: object) -> MaskedBeit:
    """A tiny encoder in evaluation mode whose positions all say something: tables of zeros would hide a mistake."""
    torch.manual_seed(0)
    encoder = MaskedBeit(replace(TINY, **kinds, **changes), 32).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if name.endswith("relative_position_bias_table"):
                parameter.normal_()
    return encoder


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


# --- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", KINDS, ids=NAMES)
@pytest.mark.parametrize("init_values", [0.1, None])
def test_positions_are_timms(kinds, init_values):
    """Same keys and same tokens as timm's model of these switches, masked nowhere or not at all."""
    encoder = encoder_with(kinds, init_values=init_values)
    model = replace(TINY, **kinds, init_values=init_values)
    plain = timm.create_model("beit_base_patch16_224", **beit_arguments(model, 32)).eval()
    plain.load_state_dict(encoder.state_dict(), strict=True)
    expected = plain.forward_features(images())
    token, nothing = torch.ones(1, 1, 32), torch.zeros(2, 16, dtype=torch.bool)
    torch.testing.assert_close(encoder(images()), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(encoder(images(), nothing, token), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("kinds", KINDS, ids=NAMES)
def test_gradients_are_timms(kinds, autocast):
    """Of every weight, tables that are looked up together included.

    The direction is drawn: a sum of squares hardly changes after a norm, and gradients of nothing are all alike.
    """
    encoder = encoder_with(kinds)
    plain = timm.create_model("beit_base_patch16_224", **beit_arguments(replace(TINY, **kinds), 32)).eval()
    plain.load_state_dict(encoder.state_dict(), strict=True)
    for network in (encoder, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            tokens = network.forward_features(images()) if network is plain else network(images())
        torch.manual_seed(4)
        (tokens * torch.randn(tokens.shape)).sum().backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in encoder.named_parameters():
        assert expected[name].norm() > 1e-3
        difference = (parameter.grad - expected[name]).norm() / expected[name].norm()
        assert difference < (5e-3 if autocast else 1e-5), name


@pytest.mark.parametrize("kinds", KINDS, ids=NAMES)
def test_blocks_add_up_fp32_under_autocast(kinds):
    """The first one too: sums over all tokens in bf16 would be the gradients of its norm."""
    encoder, seen = encoder_with(kinds), []
    for block in encoder.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        encoder(images(), torch.ones(2, 16, dtype=torch.bool), torch.zeros(1, 1, 32))
    assert seen == [torch.float32] * len(encoder.blocks)


def test_biases_are_looked_up_once_and_lie_as_fused_kernels_read_them():
    """17 tokens: rows of 24 numbers of which 17 are used, for all blocks, in the dtype of the products."""
    encoder = encoder_with(dict.fromkeys(SWITCHES, True))
    count = operators(lambda: encoder(images()))
    assert count.names["aten.index"] == 1
    with torch.autocast("cpu", torch.bfloat16):
        biases = encoder.position_biases(torch.device("cpu"), torch.float32)
    for bias in biases:
        assert bias.shape == (1, 4, 17, 17) and bias.dtype == torch.bfloat16
        assert bias.stride()[1:] == (17 * 24, 24, 1) and bias.storage_offset() % 8 == 0


@pytest.mark.parametrize("kinds", KINDS, ids=NAMES)
def test_parameters_are_those_of_the_switches(kinds):
    names = {name for name, _ in encoder_with(kinds).named_parameters()}
    assert ("pos_embed" in names) == kinds["abs_pos_emb"]
    assert ("rel_pos_bias.relative_position_bias_table" in names) == kinds["shared_rel_pos_bias"]
    tables = {f"blocks.{block}.attn.relative_position_bias_table" for block in range(2)}
    assert names & tables == (tables if kinds["rel_pos_bias"] else set())


@pytest.mark.parametrize("kinds", KINDS, ids=NAMES)
def test_masked_patches_differ_by_their_positions_alone(kinds):
    """All patches hidden: what tells them apart is position, and every kind does; gradients reach all its tables."""
    encoder = encoder_with(kinds)
    tokens = encoder(images(), torch.ones(2, 16, dtype=torch.bool), torch.full((1, 1, 32), 0.3))
    torch.testing.assert_close(tokens[0], tokens[1], rtol=0, atol=1e-6)
    # Biases change only what a patch attends to; it finds the class token and patches, which are all the same.
    assert tokens[0, 1:].std(dim=0).max() > 1e-4
    tokens.square().sum().backward()
    positions = [p for name, p in encoder.named_parameters() if "position_bias_table" in name or name == "pos_embed"]
    assert positions and all(p.grad.abs().sum() > 0 for p in positions)


@pytest.mark.parametrize("kinds", KINDS, ids=NAMES)
def test_an_exported_encoder_is_loaded_by_timm(kinds, tmp_path):
    encoder = encoder_with(kinds)
    switches = [f"model.{name}={str(on).lower()}" for name, on in kinds.items()]
    tiny_model = ["model.embed_dim=32", "model.depth=2", "model.num_heads=4"]
    recipe = apply_overrides(registry.load("vit_ti_dtm_demo"), [*tiny_model, *switches])
    write_encoder(tmp_path, recipe, encoder.state_dict())
    arguments = json.loads((tmp_path / "config.json").read_text())["model_args"]
    assert {name: arguments[f"use_{name}"] for name in SWITCHES} == kinds
    network = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert network.state_dict().keys() == encoder.state_dict().keys()
    torch.testing.assert_close(network.forward_features(images()), encoder(images()), rtol=0, atol=1e-6)


def test_absolute_positions_begin_small_and_do_not_decay():
    objective = tiny(model=replace(TINY, embed_dim=192, abs_pos_emb=True))
    positions = objective.encoder.pos_embed
    assert positions.shape == (1, 17, 192) and positions.abs().max() <= 0.02
    assert positions.std().item() == pytest.approx(0.02 * 0.5396, rel=0.05)
    decay, no_decay = parameter_groups(objective, 0.05, objective.no_decay)
    assert any(p is positions for p in no_decay["params"]) and not any(p is positions for p in decay["params"])


@pytest.mark.parametrize("kinds", KINDS, ids=NAMES)
def test_sixteen_bit_weights_with_any_positions(kinds):
    """What DeepSpeed's bf16 mode makes of the model, and autocast over fp32 weights."""
    exact = tiny(model=replace(TINY, **kinds))
    expected = exact(batch_of(4), 0)["loss"].item()
    with torch.autocast("cpu", torch.bfloat16):
        assert exact(batch_of(4), 0)["loss"].item() == pytest.approx(expected, rel=0.02)
    rounded = tiny(model=replace(TINY, **kinds)).bfloat16()
    for block in rounded.encoder.blocks:
        block.attn.k_bias = block.attn.k_bias.float()
    loss = rounded(batch_of(4), 0)["loss"]
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected, rel=0.02)


def test_impossible_positions_are_refused():
    off = [f"model.{name}=false" for name in SWITCHES]
    with pytest.raises(ValueError, match="could not tell where a patch is; set one of them to true"):
        apply_overrides(registry.load("vit_b_dtm"), off)
    for change in ("rel_pos_bias=false", "shared_rel_pos_bias=false", "abs_pos_emb=true"):
        with pytest.raises(ValueError, match=f"model.{change}: only model.architecture=beit has it"):
            apply_overrides(registry.load("vit_b_mae"), [f"model.{change}"])


# --- stochastic depth -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["beit", "vit"])
def test_drop_path_leaves_out_branches_while_training(architecture):
    """The rate grows linearly over the blocks to model.drop_path; in evaluation nothing is left out."""
    model = Model(architecture=architecture, embed_dim=32, depth=3, num_heads=4, patch_size=8, drop_path=0.4)
    torch.manual_seed(0)
    encoder = build_encoder(model, 32)
    rates = [getattr(branch, "drop_prob", 0.0) for b in encoder.blocks for branch in (b.drop_path1, b.drop_path2)]
    assert rates == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])
    plain = build_encoder(replace(model, drop_path=0.0), 32)
    plain.load_state_dict(encoder.state_dict())
    many = images(64)
    with torch.no_grad():
        expected = plain.train()(many)
        torch.testing.assert_close(encoder.eval()(many), expected)
        changed = (encoder.train()(many) - expected).flatten(1).abs().amax(1) > 1e-6
        again = encoder(many)
    # An image that keeps all of its branches differs too: they are scaled up by what is left out of the others.
    assert changed.all() and (encoder(many) != again).any()


@pytest.mark.parametrize("architecture", ["beit", "vit"])
def test_drop_path_leaves_out_as_many_branches_as_it_says(architecture):
    """A block of rate p returns an image's tokens without a branch with probability p."""
    model = Model(architecture=architecture, embed_dim=32, depth=2, num_heads=4, patch_size=8, drop_path=0.3)
    torch.manual_seed(0)
    block = build_encoder(model, 32).train().blocks[1]
    branch = torch.ones(4000, 1, 1)
    for drop_path in (block.drop_path1, block.drop_path2):
        values = drop_path(branch).unique(return_counts=True)
        torch.testing.assert_close(values[0], torch.tensor([0, 1 / 0.7]))
        assert abs(values[1][0].item() - 0.3 * 4000) < 5 * (4000 * 0.3 * 0.7) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_draws_are_those_of_timms_drop_path(dtype):
    """Also of a module that was cast: the rate is not rounded with the weights."""
    images = torch.ones(512, 1, 1, dtype=dtype)
    for rate in (0.1, 0.3):
        found = []
        for drop_path in (DropPath(rate), StochasticDepth(rate).to(dtype)):
            torch.manual_seed(0)
            found.append(drop_path(images))
        assert torch.equal(*found)
