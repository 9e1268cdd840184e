"""What MAE paints into the masked patches (He et al., Figures 2 and 3).

With normalised targets the network predicts a patch up to its brightness and contrast; these two are taken from the
true patch, as in the paper's pictures, so the picture shows the predicted structure.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.patches import patchify, unpatchify
from engine.objectives.mae import MaskedAutoencoder, pixel_moments

GRAY = 0.5  # of a masked patch in the picture, pixels in [0, 1]


@torch.no_grad()
def reconstructions(
    objective: MaskedAutoencoder, images: Tensor, noise: Tensor, mean: Tensor, std: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The picture, what the encoder saw of it, and the picture with its masked patches predicted.

    Each [B, 3, S, S] with pixels in [0, 1]. `images` are normalised by `mean` and `std` [3]; `noise` [B, N].
    """
    pred, masking = objective.reconstruct(images, noise)
    patches = patchify(images, objective.patch_size)
    if objective.settings.norm_pix_loss:
        center, scale = pixel_moments(patches)
        pred = pred * scale + center
    hidden = masking.mask.unsqueeze(-1)  # [B, N, 1]

    def pixels(x: Tensor) -> Tensor:
        return (unpatchify(x, objective.patch_size) * std.view(3, 1, 1) + mean.view(3, 1, 1)).clamp(0, 1)

    gray = ((GRAY - mean) / std).expand(objective.patch_size**2, 3).reshape(-1)
    return (
        pixels(patches),
        pixels(torch.where(hidden, gray, patches)),
        pixels(torch.where(hidden, pred, patches)),
    )
