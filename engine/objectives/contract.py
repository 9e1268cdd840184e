"""What the loop knows of a method."""

from __future__ import annotations

from torch import Tensor, nn

from shards.loader import Batch


class Objective(nn.Module):
    """The module that DeepSpeed wraps. A subclass sets `encoder`, `view` and `num_noise` and defines `forward`."""

    encoder: nn.Module  # what is evaluated and exported
    view: str  # how images are augmented: a name of shards.views
    num_noise: int  # uniform draws per sample for the mask

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Scalars on the device: "loss" is differentiated, the others are logged beside it."""
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Called once after every optimizer step (a moving average goes here)."""
