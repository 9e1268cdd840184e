"""Batch, learning rate, AdamW."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from recipes.checks import require


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with warm-up and cosine decay; batch sizes are counted in images."""

    global_batch: int  # images per optimizer step, over all ranks and micro-steps
    micro_batch: int  # images per rank in one forward pass; accumulation follows
    blr: float = 1.5e-4  # base learning rate, before the rule
    # linear: blr x global_batch / 256; sqrt: blr x sqrt(global_batch) / 4; sqrt_2048: blr x sqrt(global_batch / 2048)
    lr_rule: Literal["linear", "sqrt", "sqrt_2048"] = "linear"
    lr: float | None = None  # peak learning rate; none: from blr by the rule
    min_lr: float = 0.0
    warmup_epochs: float = 40.0  # a share of run.epochs; shrinks with run.steps
    warmup_end: Literal["after", "within"] = "after"  # peak: first step after the warm-up (MAE), or its last too (BEiT)
    weight_decay: float = 0.05  # none on vectors and biases
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_grad: float = 0.0  # global gradient norm; 0: no clipping

    def __post_init__(self) -> None:
        require(
            self.global_batch >= 1 and self.micro_batch >= 1,
            f"optim.global_batch={self.global_batch}, optim.micro_batch={self.micro_batch}: both must be at least 1",
        )
        require(
            self.global_batch % self.micro_batch == 0,
            f"optim.micro_batch={self.micro_batch}: does not divide optim.global_batch={self.global_batch}; "
            f"choose a divisor, for example {largest_divisor(self.global_batch, self.micro_batch)}",
        )
        require(self.lr is None or self.lr > 0, f"optim.lr={self.lr}: must be positive (or none)")
        require(self.blr > 0, f"optim.blr={self.blr}: must be positive")
        for name in ("min_lr", "warmup_epochs", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"optim.{name}={value}: must not be negative")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas={self.betas}: two numbers in [0, 1) are needed",
        )
        require(self.eps > 0, f"optim.eps={self.eps}: must be positive")
        require(self.clip_grad >= 0, f"optim.clip_grad={self.clip_grad}: must be 0 (off) or positive")

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up: `lr` where it is given, else `blr` by `lr_rule`.

        linear: MAE; sqrt: LUT; sqrt_2048: DTM (docs/methods.md).
        """
        if self.lr is not None:
            return self.lr
        batch = self.global_batch
        factors = {"linear": batch / 256, "sqrt": batch**0.5 / 4, "sqrt_2048": (batch / 2048) ** 0.5}
        return self.blr * factors[self.lr_rule]


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)
