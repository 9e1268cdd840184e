"""Which parameters decay."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def parameter_groups(module: nn.Module, weight_decay: float, no_decay_names: Collection[str] = ()) -> list[dict]:
    """Trainable parameters in two groups; vectors, biases and what has one of the names do not decay.

    A name is the last part of a parameter's, for example `cls_token` (in MAE and LUT class and mask tokens do decay).
    """
    decay, no_decay = [], []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            last = name.rpartition(".")[2]
            (no_decay if parameter.ndim <= 1 or last == "bias" or last in no_decay_names else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay, "name": "decay"},
        {"params": no_decay, "weight_decay": 0.0, "name": "no_decay"},
    ]
