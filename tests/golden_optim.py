"""dtm_optim*: parameter groups of pre-training and fine-tuning, learning rate and weight decay step by step."""

from __future__ import annotations

import math
import re

import numpy as np
import torch
from golden_dtm import Width, depth_of
from golden_files import Golden
from golden_weights import own_names
from torch import nn

from engine.models.classifier import build_classifier
from engine.objectives.dtm import DynamicTokenMorphing
from engine.params import layer_decay_groups, parameter_groups
from engine.plan import make_plan
from recipes import registry
from recipes.methods import Dtm
from recipes.overrides import apply_overrides
from recipes.schema import Model

LEARNING_RATE = re.compile(r"lr_e(\d+)_n(\d+)_w(\d+)")  # epochs, steps per epoch, epochs of warm-up
WEIGHT_DECAY = re.compile(r"wd_e(\d+)_n(\d+)")
TABLE_RTOL, TABLE_ATOL = 1e-9, 1e-16
IMAGE_SIZE = 32  # no name depends on it


def check_optim(golden: Golden) -> None:
    for key in golden.keys():
        if found := LEARNING_RATE.fullmatch(key):
            check_learning_rate(golden, key, *map(int, found.groups()))
        elif WEIGHT_DECAY.fullmatch(key):
            golden.close(key, np.full(len(golden.take(key)), registry.load("vit_b_dtm").optim.weight_decay))
        elif key.endswith("_names"):
            check_groups(golden, key.removesuffix("names"))


def check_learning_rate(golden: Golden, key: str, epochs: int, per_epoch: int, warmup: int) -> None:
    """The plan of a DTM recipe: peak and end are read off the table, all between is compared."""
    table = golden.take(key)
    assert len(table) == epochs * per_epoch
    decaying = per_epoch * (epochs - warmup)
    share = 0.5 * (1 + math.cos(math.pi * (decaying - 1) / decaying))  # of the way down that the last step has left
    minimum = (table[-1] - table.max() * share) / (1 - share)
    recipe = apply_overrides(
        registry.load("vit_b_dtm"),
        [
            f"run.epochs={epochs}",
            f"optim.warmup_epochs={warmup}",
            f"optim.lr={table.max()}",
            f"optim.min_lr={max(0.0, minimum)}",
        ],
    )
    plan = make_plan(recipe, per_epoch * recipe.optim.global_batch, 1)
    golden.close(key, [plan.lr(step) for step in range(plan.total_steps)], TABLE_RTOL, TABLE_ATOL)


def check_groups(golden: Golden, prefix: str) -> None:
    """Every parameter of the network that has these names, and no other: weight decay and factor of its rate."""
    names = golden.take(f"{prefix}names").tolist()
    weight_decay = float(golden.take(f"{prefix}wd").max())
    if "head.weight" in names:
        factor = re.search(r"ld([\d.]+\d)", prefix)
        network, own = classifier_of(names), dict(zip(names, names, strict=True))
        groups = layer_decay_groups(network, weight_decay, layer_decay=float(factor[1]) if factor else 1.0)
    else:
        network = objective_of(names)
        groups = parameter_groups(network, weight_decay, network.no_decay)
        weights = {name: torch.zeros(1) for name in names}
        own = {theirs: ours for ours, theirs in own_names(weights, {name: name for name in names}).items()}
    numbers = numbers_of(network, groups)
    assert set(own.values()) == numbers.keys(), f"{golden.name}: {prefix}names: {set(own.values()) ^ numbers.keys()}"
    golden.same(f"{prefix}names", list(own))
    golden.close(f"{prefix}wd", [numbers[own[name]][0] for name in names])
    golden.close(f"{prefix}lr_scale", [numbers[own[name]][1] for name in names])


def numbers_of(network: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float]]:
    """Weight decay and factor of the learning rate, by name."""
    of = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        of[id(parameter)]: (group["weight_decay"], group.get("lr_scale", 1.0))
        for group in groups
        for parameter in group["params"]
    }


def model_of(names: list[str]) -> Model:
    return Model(
        architecture="beit",
        embed_dim=8,
        depth=depth_of(names),
        num_heads=2,
        patch_size=8,
        init_values=0.1 if "blocks.0.gamma_1" in names else None,
        rel_pos_bias="blocks.0.attn.relative_position_bias_table" in names,
        shared_rel_pos_bias="rel_pos_bias.relative_position_bias_table" in names,
        abs_pos_emb="pos_embed" in names,
    )


def objective_of(names: list[str]) -> DynamicTokenMorphing:
    return DynamicTokenMorphing(Dtm(num_masked=0), model_of(names), IMAGE_SIZE, teacher=Width(4), seed=0)


def classifier_of(names: list[str]) -> nn.Module:
    pooling = "avg" if "fc_norm.weight" in names else "token"
    return build_classifier(model_of(names), IMAGE_SIZE, num_classes=3, global_pool=pooling)
