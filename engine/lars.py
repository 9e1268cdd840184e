"""LARS as linear probes use it: a matrix's step has a length in proportion to the matrix's (arXiv 1708.03888).

timm's LARS adds up the norms of gradient and decay, as the paper does; in the probes of MoCo v3 and MAE it is the norm
of their sum, and vectors neither decay nor are scaled.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from recipes.checks import require


class Lars(Optimizer):
    """Momentum SGD; a tensor of two dimensions or more takes steps of trust x its norm / the norm of its gradient.

    Norms are of whole tensors, so ZeRO must not divide them. ValueError for a negative number.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict],
        lr: float,
        *,
        momentum: float = 0.9,
        trust: float = 0.001,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = dict(lr=lr, momentum=momentum, trust=trust, weight_decay=weight_decay)
        for name, value in defaults.items():
            require(value >= 0, f"{name}={value}: must not be negative")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = scaled(parameter, update + group["weight_decay"] * parameter, group["trust"])
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                velocity = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.sub_(group["lr"] * velocity)


def scaled(parameter: Tensor, update: Tensor, trust: float) -> Tensor:
    """`update` times trust x |parameter| / |update|; as it is where either norm is 0."""
    length, step = parameter.norm(), update.norm()
    return update * torch.where((length > 0) & (step > 0), trust * length / step, 1.0)
