"""Which parameters decay, and how fast each layer learns."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from torch import nn

from recipes.checks import require

EMBEDDINGS = ("cls_token", "pos_embed", "patch_embed.")  # what comes before the first block


def parameter_groups(module: nn.Module, weight_decay: float, no_decay_names: Collection[str] = ()) -> list[dict]:
    """Trainable parameters in two groups; vectors, biases and what has one of the names do not decay.

    A name is the last part of a parameter's, for example `cls_token` (in MAE and LUT class and mask tokens do decay).
    """
    decay, no_decay = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            (decay if decays(name, parameter, no_decay_names) else no_decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay, "name": "decay"},
        {"params": no_decay, "weight_decay": 0.0, "name": "no_decay"},
    ]


def decays(name: str, parameter: nn.Parameter, no_decay_names: Collection[str]) -> bool:
    last = name.rpartition(".")[2]
    return parameter.ndim > 1 and last != "bias" and last not in no_decay_names


def layer_decay_groups(
    network: nn.Module,
    weight_decay: float,
    *,
    layer_decay: float,
    no_decay_names: Collection[str] = ("cls_token", "pos_embed"),
) -> list[dict]:
    """Trainable parameters of a ViT or BEiT of timm's, one or two groups per layer, for fine-tuning.

    A group's `lr_scale` multiplies the learning rate of the step (`set_learning_rate`): layer_decay^(depth + 1 - layer)
    where the embeddings are layer 0, block i is layer i + 1, and all the rest (last norm, head) is layer depth + 1,
    whose scale is 1 (BEiT, arXiv 2106.08254; MAE, appendix A.1). Weight decay as in `parameter_groups`. ValueError for
    a `layer_decay` outside of (0, 1] and for another network.
    """
    require(0 < layer_decay <= 1, f"layer_decay={layer_decay}: a factor in (0, 1] is needed (1: all layers alike)")
    require(hasattr(network, "blocks"), "layer_decay: the network has no `blocks`; a ViT or BEiT of timm's is needed")
    depth = len(network.blocks)
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decayed = layer_of(name, depth), decays(name, parameter, no_decay_names)
        fresh = {
            "params": [],
            "weight_decay": weight_decay if decayed else 0.0,
            "lr_scale": layer_decay ** (depth + 1 - layer),
            "name": f"layer_{layer}_{'decay' if decayed else 'no_decay'}",
        }
        groups.setdefault((layer, decayed), fresh)["params"].append(parameter)
    return list(groups.values())


def layer_of(name: str, depth: int) -> int:
    """Layer 0 ... depth + 1 of a parameter of a network of `depth` blocks."""
    if name.startswith(EMBEDDINGS):
        return 0
    block = re.match(r"blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else depth + 1


def set_learning_rate(groups: Iterable[dict], lr: float) -> None:
    """Give an optimizer's groups the step's learning rate, times their own `lr_scale` where they have one."""
    for group in groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
