"""Which parameters decay: matrices do, vectors, biases and named tokens do not, frozen ones are not trained at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine.objectives.mae import MaskedAutoencoder
from engine.params import parameter_groups
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
