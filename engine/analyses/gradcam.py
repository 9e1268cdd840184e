"""Which patches speak for a class: Grad-CAM (Selvaraju et al., ICCV 2017) on a transformer's patch tokens."""

from __future__ import annotations

from torch import Tensor


def class_activation_map(activations: Tensor, gradients: Tensor) -> Tensor:
    """Map [B, S, S], not negative, from the patch tokens [B, S * S, D] of a layer and a logit's gradients by them.

    The channels are added up, each weighted by its mean gradient; what speaks against the class counts as 0.
    """
    weights = gradients.mean(dim=1, keepdim=True)  # [B, 1, D]
    cam = (activations * weights).sum(dim=-1).clamp_min(0)
    side = round(cam.shape[1] ** 0.5)
    if side**2 != cam.shape[1]:
        raise ValueError(
            f"activations {tuple(activations.shape)}: patches of a square grid, without class token, needed"
        )
    return cam.unflatten(1, (side, side))


def min_max(maps: Tensor) -> Tensor:
    """Each map [B, S, S] from 0 at its smallest to 1 at its largest value; a flat one is 0 everywhere."""
    lowest, highest = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    spread = highest - lowest
    return (maps - lowest) / spread.masked_fill(spread == 0, 1)
