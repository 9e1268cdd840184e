"""Which patches a teacher finds alike: the groups of dynamic token morphing, painted over the image (DTM, Figure 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.models.patches import patchify, unpatchify
from engine.morphing import group_tokens


@torch.no_grad()
def morph_map(targets: Tensor, pixels: Tensor, patch_size: int, *, removed: int, num_steps: int) -> Tensor:
    """`pixels` [B, 3, S, S] with every patch in the mean colour of its group.

    `targets` [B, N, T] are the teacher's; `removed` tokens are merged away in `num_steps` steps.
    """
    labels = group_tokens(targets, removed, num_steps).labels  # [B, N]
    patches = patchify(pixels, patch_size)  # [B, N, p p 3]
    colours = patches.unflatten(2, (patch_size**2, 3)).mean(dim=2)  # [B, N, 3]
    alike = (labels.unsqueeze(2) == labels.unsqueeze(1)).float()  # [B, N, N]
    means = alike @ colours / alike.sum(dim=2, keepdim=True)
    return unpatchify(means.unsqueeze(2).expand(-1, -1, patch_size**2, -1).flatten(2), patch_size)
