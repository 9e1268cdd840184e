"""Which parameters decay: matrices do, vectors, biases and named tokens do not, frozen ones are not trained at all.

And how fast each layer learns when a network is fine-tuned.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.models.classifier import build_classifier
from engine.objectives.mae import MaskedAutoencoder
from engine.params import layer_decay_groups, parameter_groups, set_learning_rate
from recipes.methods import Mae
from recipes.schema import Model


class Small(nn.Module):
    """One parameter of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.deep = nn.ModuleDict({"cls_token": nn.Linear(2, 2), "inner": nn.Linear(2, 2)})
        self.wide = nn.Module()
        self.wide.bias = nn.Parameter(torch.zeros(2, 3))  # a bias with two dimensions
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)


def names(module: nn.Module, *arguments) -> dict[str, set[str]]:
    """Names of the parameters of each group."""
    of = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, *arguments)
    assert sum(len(group["params"]) for group in groups) == len({id(p) for g in groups for p in g["params"]})
    return {group["name"]: {of[id(parameter)] for parameter in group["params"]} for group in groups}


MATRICES = {"linear.weight", "deep.cls_token.weight", "deep.inner.weight"}


def test_vectors_and_biases_do_not_decay_and_frozen_ones_are_not_trained():
    found = names(Small(), 0.05)
    assert found["decay"] == MATRICES | {"cls_token"}
    everything = {name for name, _ in Small().named_parameters()}
    assert found["no_decay"] == everything - found["decay"] - {"frozen"}
    assert {"linear.bias", "norm.weight", "norm.bias", "wide.bias"} <= found["no_decay"]


def test_a_name_is_the_last_part_of_a_parameters():
    """`cls_token` spares the parameter of that name, not the weights of a module called so."""
    found = names(Small(), 0.05, {"cls_token"})
    assert found["decay"] == MATRICES and "cls_token" in found["no_decay"]


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_decay_is_that_of_the_optimizer(weight_decay):
    groups = parameter_groups(Small(), weight_decay)
    assert {group["name"]: group["weight_decay"] for group in groups} == {"decay": weight_decay, "no_decay": 0.0}
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [weight_decay, 0.0]


def test_mae_decays_its_tokens_and_trains_no_position():
    """As in the released program: timm's groups without a list of exceptions (He et al.)."""
    model = Model(embed_dim=32, depth=1, num_heads=2, patch_size=8)
    settings = Mae(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    found = names(MaskedAutoencoder(settings, model, 32), 0.05, MaskedAutoencoder.no_decay)
    assert {"encoder.cls_token", "decoder.mask_token", "encoder.patch_embed.proj.weight"} <= found["decay"]
    assert not any("pos_embed" in name for group in found.values() for name in group)
    assert all(name.endswith("weight") or name.endswith("_token") for name in found["decay"])


# --- by layer -------------------------------------------------------------------------------------------------------


def classifier(architecture: str = "vit") -> nn.Module:
    model = Model(architecture=architecture, embed_dim=32, depth=3, num_heads=2, patch_size=8)
    return build_classifier(model, 32, num_classes=5)


@pytest.mark.parametrize("architecture", ["vit", "beit"])
def test_layers_learn_faster_towards_the_head(architecture):
    network = classifier(architecture)
    of = {id(parameter): name for name, parameter in network.named_parameters()}
    groups = layer_decay_groups(network, 0.05, layer_decay=0.5)
    listed = [of[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(of.values())
    for group in groups:
        for name in (of[id(parameter)] for parameter in group["params"]):
            block = int(name.split(".")[1]) if name.startswith("blocks.") else None
            last = 4 if name.startswith(("fc_norm", "head")) else 0
            assert group["lr_scale"] == 0.5 ** (4 - (block + 1 if block is not None else last)), name
            plain = name.endswith("bias") or "norm" in name or name in ("cls_token", "pos_embed")
            assert group["weight_decay"] == (0.0 if plain else 0.05), name
    assert len({group["name"] for group in groups}) == len(groups)


def test_frozen_layers_are_in_no_group():
    network = classifier()
    network.patch_embed.requires_grad_(False)
    listed = {id(p) for group in layer_decay_groups(network, 0.05, layer_decay=0.5) for p in group["params"]}
    assert listed == {id(p) for p in network.parameters() if p.requires_grad}


def test_names_without_decay_may_be_others():
    groups = layer_decay_groups(classifier(), 0.05, layer_decay=1.0, no_decay_names=("cls_token",))
    assert {group["lr_scale"] for group in groups} == {1.0}
    decayed = sum(len(group["params"]) for group in groups if group["weight_decay"])
    both = layer_decay_groups(classifier(), 0.05, layer_decay=1.0)
    assert decayed == 1 + sum(len(group["params"]) for group in both if group["weight_decay"])


@pytest.mark.parametrize("layer_decay", [0.0, -0.5, 1.1])
def test_impossible_layer_decay_is_refused(layer_decay):
    with pytest.raises(ValueError, match=f"layer_decay={layer_decay}: a factor in"):
        layer_decay_groups(classifier(), 0.05, layer_decay=layer_decay)


def test_networks_without_blocks_are_refused():
    with pytest.raises(ValueError, match="the network has no `blocks`"):
        layer_decay_groups(Small(), 0.05, layer_decay=0.5)


def test_a_group_learns_at_its_own_rate():
    optimizer = torch.optim.AdamW(layer_decay_groups(classifier(), 0.05, layer_decay=0.5), lr=1.0)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    set_learning_rate(optimizer.param_groups, 0.3)
    assert {group["lr"] for group in optimizer.param_groups} == {0.3 * 0.5**k for k in range(5)}
    assert optimizer.param_groups[-1]["lr"] == 0.3
