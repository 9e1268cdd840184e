"""What the loop knows of a method."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shards.draws.masks import MaskDraws
from shards.reading.loader import Batch

AVERAGE = "average"  # what an objective calls its moving average, where it keeps one outside


class Objective(nn.Module):
    """The module that DeepSpeed wraps. A subclass sets `encoder`, `view` and `masks` and defines `forward`."""

    encoder: nn.Module  # what is evaluated and exported
    view: str  # how images are augmented: a name of shards.augment.views
    masks: MaskDraws  # what a batch brings for the mask
    no_decay: frozenset[str] = frozenset()  # last names of parameters without weight decay, beside vectors and biases

    def __init__(self) -> None:
        super().__init__()
        self.outside: dict[str, nn.Module] = {}  # teachers; see keep_outside
        self.moving: set[str] = set()  # those that training changes

    def keep_outside(self, name: str, module: nn.Module, *, moves: bool = False) -> None:
        """Hold a teacher: in evaluation mode, without gradients, and in nobody's parameters() or state_dict().

        ZeRO must not see it (inside stage 3, a moving average is silently lost), nor may `.train()` or a cast to 16
        bits reach it. A dict hides it from nn.Module; it only follows to the device. One that `moves` is saved in
        checkpoints, a frozen one is not.
        """
        self.outside[name] = module.eval().requires_grad_(False)
        if moves:
            self.moving.add(name)

    def _apply(self, fn, recurse: bool = True):
        device = fn(torch.empty(0)).device
        for module in self.outside.values():
            module.to(device)
        return super()._apply(fn, recurse)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Scalars on the device: "loss" is differentiated, the others are logged beside it."""
        raise NotImplementedError

    def after_step(self, step: int, total_steps: int) -> None:
        """Called once after every optimizer step (a moving average goes here)."""

    def facts(self) -> dict[str, str]:
        """What a run and its continuation must share beside the recipe and the data, by name."""
        return {}

    def outside_state(self) -> dict[str, Tensor]:
        """Weights of the teachers that move, by `name.key`; equal on all ranks."""
        return nn.ModuleDict({name: self.outside[name] for name in self.moving}).state_dict()

    def load_outside_state(self, state: dict[str, Tensor]) -> None:
        """The way back; RuntimeError names every missing or unexpected key."""
        nn.ModuleDict({name: self.outside[name] for name in self.moving}).load_state_dict(state, strict=True)
